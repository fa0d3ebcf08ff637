"""Files as documents: every kind and compression, and every way in which one can be broken."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from mor_jax.config import ConfigError, DataConfig
from mor_jax.data import corpus, files, readers
from mor_jax.data.document import Document, Unreadable

pa = pytest.importorskip('pyarrow')
zstandard = pytest.importorskip('zstandard')
pq = pytest.importorskip('pyarrow.parquet')

TEXTS = ['one\ntext', 'zweiter Text: äöü', '第三', '🙂' * 1000]


def json_lines(texts=TEXTS, key='text'):
  return ''.join(json.dumps({'id': i, key: text}) + '\n' for i, text in enumerate(texts)).encode()


def zstd(content):
  return zstandard.compress(content)


COMPRESS = {
  '': lambda content: content,
  '.gz': gzip.compress,
  '.zst': zstd,
  '.bz2': bz2.compress,
  '.xz': lzma.compress,
}


def records(pattern, key='text'):
  return list(files.Files(str(pattern), readers.Texts(key)).records())


def texts(pattern, key='text'):
  return [record.text for record in records(pattern, key)]


@pytest.mark.parametrize('compression', COMPRESS)
def test_text_and_json_lines(tmp_path, compression):
  for name, content in {'b.jsonl': json_lines(), 'a.txt': 'äb\n'.encode(), 'c.md': b'# c'}.items():
    (tmp_path / f'{name}{compression}').write_bytes(COMPRESS[compression](content))
  assert texts(f'{tmp_path}/*') == ['äb\n', *TEXTS, '# c']
  assert [record.name for record in records(f'{tmp_path}/b.*')][
    1
  ] == f'{tmp_path}/b.jsonl{compression}, line 2'


@pytest.mark.parametrize('compression', ['.gz', '.zst', '.bz2', '.xz'])
def test_compressed_in_several_parts(tmp_path, compression):
  half = len(json_lines()) // 2
  parts = [json_lines()[:half], json_lines()[half:]]
  (tmp_path / f'a.jsonl{compression}').write_bytes(b''.join(map(COMPRESS[compression], parts)))
  assert texts(f'{tmp_path}/a.*') == TEXTS


def test_parquet(tmp_path):
  pq.write_table(pa.table({'body': TEXTS, 'n': [1, 2, 3, 4]}), tmp_path / 'a.parquet', row_group_size=2)
  assert texts(tmp_path / 'a.parquet', 'body') == TEXTS
  with pytest.raises(ConfigError, match=r"no column data\.text_key='text'; its columns are body, n"):
    records(tmp_path / 'a.parquet')


def test_patterns(tmp_path, monkeypatch):
  for name in ('x/1.txt', 'x/deep/er/2.txt', 'y/3.md', 'y/4.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  assert texts(f'{tmp_path}/x/**/*.txt') == ['x/1.txt', 'x/deep/er/2.txt']
  assert texts(f'{tmp_path}/y/*, {tmp_path}/*/1.txt,{tmp_path}/y/4.txt') == ['x/1.txt', 'y/3.md', 'y/4.txt']
  monkeypatch.chdir(tmp_path)
  assert texts('[xy]/[14].txt') == ['x/1.txt', 'y/4.txt']


def test_long_text_is_cut_at_line_ends_without_loss(tmp_path, monkeypatch):
  monkeypatch.setattr(readers, 'LONGEST_DOCUMENT', 100)
  content = 'häuser\n' * 100 + 'é' * 333 + '\nend'
  (tmp_path / 'a.txt').write_text(content)
  parts = texts(tmp_path / 'a.txt')
  assert ''.join(parts) == content
  assert len(parts) > 10
  assert all(len(part.encode()) <= 200 for part in parts)
  assert all(part.endswith('\n') for part in parts[:8])


@pytest.mark.parametrize(
  ('line', 'reason'),
  [
    (b'\xff\xfe\n', 'not UTF-8'),
    (b'{"text": "a"\n', 'not JSON'),
    (b'{"txt": "a"}\n', "no key 'text' (data.text_key)"),
    (b'[1, 2]\n', "no key 'text' (data.text_key)"),
    (b'{"text": 3}\n', "'text' (data.text_key) is not a text"),
    (b'{"text": "\\ud800"}\n', 'not UTF-8'),
    (b'{"text": "cut o', 'not JSON, cut off at the end of the file'),
  ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "good"}\n\n' + line)
  where = f'{tmp_path}/a.jsonl, line 3'
  assert records(tmp_path / 'a.jsonl') == [
    Document(f'{tmp_path}/a.jsonl, line 1', 'good'),
    Unreadable(where, reason),
  ]


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'fine\nfine\ncaf\xe9\n')
  assert records(tmp_path / 'a.txt') == [Unreadable(f'{tmp_path}/a.txt, line 3', 'not UTF-8')]


@pytest.mark.parametrize(
  'name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.txt.gz', 'a.txt.zst', 'a.jsonl.bz2', 'a.jsonl.xz', 'a.parquet']
)
@pytest.mark.parametrize(
  'damage', [lambda content: content[:-20], lambda content: b'no such format' * 9, lambda _: b'']
)
def test_truncated_and_damaged_files_stop_with_their_name(tmp_path, name, damage):
  path = tmp_path / name
  if name == 'a.parquet':
    pq.write_table(pa.table({'text': TEXTS}), path)
  else:
    content = json_lines([f'{i * 7919 % 1000}' for i in range(2000)])
    path.write_bytes(COMPRESS['.' + name.rpartition('.')[2]](content))
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ConfigError, match=rf'{path} is truncated or damaged after .*fetch it again'):
    records(path)


def test_a_list_an_object_or_lines_of_json(tmp_path):
  listed = [{'text': text} for text in TEXTS]
  for name, content in {
    'list.json': json.dumps(listed, indent=1),
    'short.json': json.dumps(listed),
    'object.json': json.dumps(listed[0], indent=1),
    'lines.json': json_lines().decode(),
    'lines.NDJSON': json_lines().decode(),
  }.items():
    (tmp_path / name).write_text(content)
    assert texts(tmp_path / name) == (TEXTS[:1] if name == 'object.json' else TEXTS), name
  (tmp_path / 'a.JSON.gz').write_bytes(gzip.compress(json.dumps(listed).encode()))
  assert texts(tmp_path / 'a.JSON.gz') == TEXTS
  (tmp_path / 'cut.json').write_text(json.dumps(listed, indent=1)[:-5])
  with pytest.raises(ConfigError, match=r'cut\.json is truncated or damaged'):
    records(tmp_path / 'cut.json')


def test_a_mark_of_byte_order_is_no_text(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf' + json_lines())
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfone')
  assert texts(tmp_path / 'a.jsonl') == TEXTS
  assert texts(tmp_path / 'a.txt') == ['one']


def test_texts_within_objects_and_texts_of_bytes(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"meta": {"text": "one"}}\n{"meta.text": "two"}\n{"meta": 3}\n')
  found = records(tmp_path / 'a.jsonl', 'meta.text')
  assert [getattr(record, 'text', record) for record in found] == [
    'one',
    'two',
    Unreadable(f'{tmp_path}/a.jsonl, line 3', "no key 'meta.text' (data.text_key)"),
  ]
  meta = [{'text': text, 'n': 1} for text in TEXTS]
  pq.write_table(pa.table({'meta': meta, 'raw': [text.encode() for text in TEXTS]}), tmp_path / 'a.parquet')
  assert texts(tmp_path / 'a.parquet', 'meta.text') == TEXTS
  assert texts(tmp_path / 'a.parquet', 'raw') == TEXTS


def test_null_is_an_empty_text(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": null}\n{"text": "one"}\n')
  reading = corpus.Reading(DataConfig(source=f'files:{tmp_path}/a.jsonl', max_bad_fraction=0.0))
  assert [document.text for _, document in reading] == ['one']
  assert dict(reading.dropped) == {'empty': 1}


def test_names_are_taken_literally_where_they_exist(tmp_path):
  for name in ('a,b.txt', 'c[1].txt', 'd e.txt', 'sub/f.md', 'sub/.hidden/g.txt', 'sub/h.csv'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  for name in ('a,b.txt', 'c[1].txt', 'd e.txt'):
    assert texts(tmp_path / name) == [name]
  assert texts(f'{tmp_path}/c[1].txt, {tmp_path}/d e.txt') == ['c[1].txt', 'd e.txt']
  assert texts(tmp_path / 'sub') == ['sub/f.md']


def test_one_file_under_two_names_is_read_once(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').write_text('one')
  monkeypatch.chdir(tmp_path)
  assert texts(f'a.txt,{tmp_path}/a.txt,./a.txt') == ['one']


def test_a_link_to_nothing_is_named(tmp_path):
  (tmp_path / 'a.txt').write_text('one')
  os.symlink(tmp_path / 'gone.txt', tmp_path / 'b.txt')
  with pytest.raises(ConfigError, match=r'matches .*b\.txt, a link to .*gone\.txt, which does not exist'):
    records(f'{tmp_path}/*.txt')


def test_a_large_window_of_zstd_is_read(tmp_path):
  window = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
  content = json_lines() * 5
  (tmp_path / 'a.jsonl.zst').write_bytes(
    zstandard.ZstdCompressor(compression_params=window).compress(content)
  )
  assert texts(tmp_path / 'a.jsonl.zst') == TEXTS * 5


def test_a_page_of_parquet_that_was_changed_is_noticed(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'text': ['x' * 1000]}), path, compression='none', write_page_checksum=True)
  content = path.read_bytes()
  path.write_bytes(content.replace(b'x' * 100, b'x' * 99 + b'y', 1))
  with pytest.raises(ConfigError, match='is truncated or damaged'):
    records(path)


def test_a_single_text_is_cut_in_two(tmp_path):
  lines = [f'line {i}\n' for i in range(100)]
  (tmp_path / 'book.txt').write_text(''.join(lines))
  data = DataConfig(source=f'files:{tmp_path}/book.txt', validation_fraction=0.1)
  found = {split: [document.text for document in corpus.documents(data, split)] for split in corpus.SPLITS}
  assert found['train'] + found['validation'] == [''.join(lines[:90]), ''.join(lines[90:])]


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('*.txt', 'matches no file'),
    ('none.txt', 'matches no file'),
    ('*.csv', r'b\.csv, which is none of \.txt'),
  ],
)
def test_nothing_to_read(tmp_path, name, message):
  (tmp_path / 'b.csv').write_text('1,2')
  with pytest.raises(ConfigError, match=rf'data\.source=files:{tmp_path}.*{message}'.replace('*.', '.*')):
    files.Files(f'{tmp_path}/{name}', readers.Texts('text'))


def test_bytes_read_reach_the_total(tmp_path):
  for name in ('a.jsonl', 'b.jsonl.gz', 'c.txt'):
    (tmp_path / name).write_bytes(COMPRESS['.gz' if name.endswith('gz') else ''](json_lines()))
  source = files.Files(f'{tmp_path}/*', readers.Texts('text'))
  seen = [source.bytes_read for _ in source.records()]
  assert seen == sorted(seen)
  assert source.bytes_read == source.total_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def write(tmp_path, lines):
  (tmp_path / 'a.jsonl').write_bytes(b''.join(lines))
  return f'files:{tmp_path}/a.jsonl'


def test_bad_documents_are_skipped_up_to_the_limit(tmp_path):
  good = [json.dumps({'text': f'text {i}'}).encode() + b'\n' for i in range(95)]
  source = write(tmp_path, [*good, b'{\n', b'\xff\n', b'{}\n', b'{"text": " "}\n', good[0]])
  reading = corpus.Reading(DataConfig(source=source, max_bad_fraction=0.03, drop_duplicates=True))
  assert len({document.text for _, document in reading}) == 95
  assert dict(reading.dropped) == {
    'not JSON': 1,
    'not UTF-8': 1,
    "no key 'text' (data.text_key)": 1,
    'empty': 1,
    'duplicate': 1,
  }
  with pytest.raises(
    ConfigError, match=r'3 of 100 documents cannot be read, more than data\.max_bad_fraction=0\.02'
  ):
    list(corpus.Reading(DataConfig(source=source, max_bad_fraction=0.02)))


def test_too_many_bad_documents_stop_early(tmp_path):
  source = write(tmp_path, [b'{"text": "x"}\n'] * 500 + [b'{\n'] * 100_000)
  with pytest.raises(ConfigError, match=r'51 of 551 .*a\.jsonl, line 501: not JSON'):
    list(corpus.Reading(DataConfig(source=source, max_bad_fraction=0.05)))


def test_split_by_text(tmp_path):
  lines = [json.dumps({'text': f'text {i % 3000}'}).encode() + b'\n' for i in range(6000)]
  data = DataConfig(source=write(tmp_path, lines), validation_fraction=0.1)
  found = {split: {d.text for d in corpus.documents(data, split)} for split in corpus.SPLITS}
  assert not found['train'] & found['validation']  # two copies of a text are on the same side
  assert len(found['train'] | found['validation']) == 3000
  assert 0.08 < len(found['validation']) / 3000 < 0.12


def test_mixture_keeps_its_shares_and_order(tmp_path):
  for name, size in (('a', 10), ('b', 100)):
    (tmp_path / f'{name}.jsonl').write_bytes(json_lines([name * size] * 500))
  source = f'0.75*files:{tmp_path}/a.jsonl; 0.25*files:{tmp_path}/b.jsonl'
  first, second = (list(corpus.open_source(DataConfig(source=source)).records()) for _ in range(2))
  assert first == second
  joined = ''.join(document.text for document in first)
  assert joined.count('a') == 5000  # it ends with the first source
  assert joined.count('a') / len(joined) == pytest.approx(0.75, abs=0.02)
  half = joined[: len(joined) // 2]
  assert half.count('a') / len(half) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize('source', ['c4', 'files:', 'embedded;', '0*embedded;1*embedded', 'hf:', 'tfds:c4'])
def test_unknown_sources(source):
  with pytest.raises(ConfigError, match=r'data\.source='):
    corpus.open_source(DataConfig(source=source))


def test_bucket_that_cannot_be_reached(monkeypatch):
  def missing(self, pattern):
    raise ImportError('no module gcsfs')

  monkeypatch.setattr(type(files.epath.Path('gs://bucket')), 'glob', missing)
  with pytest.raises(ConfigError, match=r'gs://bucket/a/\*\.txt cannot be listed .*gcsfs'):
    files.Files('gs://bucket/a/*.txt', readers.Texts('text'))
