"""Answers of an exported model in transformers, where mor_jax cannot be imported (`benchmarks/path.py`).

python -m benchmarks.path_transformers EXPORTED QUESTIONS.json ANSWERS.json NEW_TOKENS CAPACITIES
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, questions: str, output: str, new_tokens: str, capacities: str) -> None:
  """Writes a prompt, the tokens of the answer and the token that ends a turn for each question."""
  sys.modules['mor_jax'] = None  # whoever imports it fails
  torch.manual_seed(0)
  tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
  options = {'dtype': torch.float32, 'capacities': [float(one) for one in capacities.split(',')]}
  model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
  answers = []
  for question in json.loads(Path(questions).read_text(encoding='utf-8')):
    prompt = tokenizer.apply_chat_template(
      [{'role': 'user', 'content': question}],
      add_generation_prompt=True,
      return_tensors='pt',
      return_dict=True,
    )
    with torch.no_grad():
      whole = model.generate(**prompt, max_new_tokens=int(new_tokens), do_sample=False)[0].tolist()
    size = prompt['input_ids'].shape[1]
    answers.append({'prompt': whole[:size], 'answer': whole[size:], 'end': tokenizer.eos_token_id})
  Path(output).write_text(json.dumps(answers), encoding='utf-8')
  print(f'{type(model).__name__} answered {len(answers)} questions')


if __name__ == '__main__':
  main(*sys.argv[1:])
