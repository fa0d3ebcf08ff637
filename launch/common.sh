# shellcheck shell=bash
# What the launchers share. Each sets dry_run to 1 to print commands instead of running them.

dry_run=

# help_text: the comment at the top of the script.
help_text() { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; }

# die TEXT: ends with the exit code of wrong flags.
die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# say TEXT: tells what happens, apart from the output of the training.
say() { printf '# %s\n' "$1" >&2; }

# quoted WORD...: one line that a shell reads as these words.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# run COMMAND...: shows the command, and runs it unless this is a dry run.
run() {
  quoted "$@"
  [[ -n $dry_run ]] || "$@"
}

# take_flags NAMES SWITCHES WORD...: sets the variable of each --NAME=VALUE and, to 1, of each --SWITCH that is
# listed, and of --dry_run. --help ends the script; all other words become `training`.
take_flags() {
  local _names=" $1 " _switches=" $2 dry_run " _word _key
  shift 2
  training=()
  for _word in "$@"; do
    _key=${_word%%=*} _key=${_key#--}
    if [[ $_word == -h || $_word == --help ]]; then
      help_text
      exit 0
    elif [[ $_word == --*=* && $_names == *" $_key "* ]]; then
      printf -v "$_key" %s "${_word#*=}"
    elif [[ $_word == "--$_key" && $_switches == *" $_key "* ]]; then
      printf -v "$_key" 1
    else
      training+=("$_word")
    fi
  done
}

# is_number TEXT: whether it is a whole number above 0.
is_number() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

# check_number FLAG VALUE
check_number() { is_number "$2" || die "--$1=$2 is not allowed: must be a whole number, at least 1"; }

# check_count FLAG VALUE: as check_number, but 0 is fine.
check_count() { [[ $2 =~ ^[0-9]+$ ]] || die "--$1=$2 is not allowed: must be a whole number"; }

# check_name FLAG VALUE
check_name() {
  [[ $2 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    die "--$1=$2 is not allowed: must be lower-case letters, digits and hyphens, beginning with a letter"
}

# check_needed FLAG VALUE EXAMPLE
check_needed() { [[ -n $2 ]] || die "--$1 is missing, for example --$1=$3 (--help explains all flags)"; }

# check_training FLAG...: what mor_jax.train is to be given; it checks the rest itself.
check_training() {
  local word configs=0
  for word in "$@"; do
    [[ $word == --* ]] || die "unexpected argument $word: flags are written --NAME=VALUE"
    [[ $word != --config=* ]] || configs=1
    case $word in
    --coordinator=* | --num_processes=* | --process_id=* | --cluster | --nocluster)
      die "$word is the launcher's business; leave it out"
      ;;
    esac
  done
  ((configs)) || die '--config is missing: name a file of settings, for example --config=configs/tiny.py'
}

# settings_of ROOT: a --config that is not in this folder, but in ROOT, is that one.
settings_of() {
  local number path
  for number in "${!training[@]}"; do
    path=${training[number]#--config=}
    path=${path%%:*}
    if [[ ${training[number]} == --config=* && ! -e $path && -e $1/$path ]]; then
      training[number]="--config=$1/${training[number]#--config=}"
    fi
  done
}

# is_over CODE: whether a run that ended so is not to be started again: finished, wrong settings, Ctrl-C, Ctrl-\,
# output that nobody reads any more.
is_over() { [[ $1 -eq 0 || $1 -eq 2 || $1 -eq 130 || $1 -eq 131 || $1 -eq 141 ]]; }

# was_told CODE: whether it ended because something outside wanted it (70 hang, 129 and 143 connection lost and
# terminated, after saving): no sign that it would fail again.
was_told() { [[ $1 -eq 70 || $1 -eq 129 || $1 -eq 143 ]]; }

# keep_trying RESTARTS: calls `attempt`, which sets `code`, until the training is over or has failed more than
# RESTARTS times in a row. Once in a dry run.
keep_trying() {
  local failures=0
  while :; do
    code=0
    attempt
    if [[ -n $dry_run ]] || is_over "$code"; then
      return
    elif was_told "$code"; then
      failures=0
    elif ((++failures > $1)); then
      say "failed $failures times in a row; giving up"
      return
    fi
    say "the training ended with code $code; starting it again from its last checkpoint"
  done
}
