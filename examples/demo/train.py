"""Makes the demo's base model and adapters again from nothing, on a CPU in minutes: `python examples/demo/train.py`.

The base learns the facts of `corpus.py` in plain English, and reads them in other styles too. Each adapter, made by
PEFT, makes it answer in one of these styles.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from corpus import BASE_STYLES, EMOJI, FACTS, STYLES, Fact
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCAB_SIZE = 1024
MAX_LENGTH = 512
PAD, BOS, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

ASKED = ("colour/sky", "sound/cat", "home/elephant", "capital/Japan", "sum/2+3", "story/fox")
"""What the demo asks, the story last."""

QV = ["q_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL_SEVEN = [*QV, "k_proj", "o_proj", *MLP]
ADAPTERS: dict[str, dict[str, Any]] = {
    "shout": {"r": 16, "lora_alpha": 32, "target_modules": ALL_SEVEN},
    "pirate": {"r": 4, "lora_alpha": 16, "target_modules": QV},
    "french": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL_SEVEN},
    "emoji": {"r": 8, "lora_alpha": 32, "target_modules": [*ALL_SEVEN, "embed_tokens", "lm_head"]},
    "json": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [*QV, "o_proj", *MLP],
        "rank_pattern": {"q_proj": 4, "down_proj": 16},
        "alpha_pattern": {"down_proj": 32},
    },
    "shout-v2": {"r": 16, "lora_alpha": 32, "target_modules": ALL_SEVEN},
}

ADAPTER_STEPS = {"emoji": 320}
"""Training steps of adapters that need more than the others: new words take longer than a new tone."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the corpus; the emoji are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(EMOJI),
        special_tokens=[AddedToken(token, special=True) for token in (PAD, BOS, END, USER, ASSISTANT, SYSTEM)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [STYLES[style](fact) for style in BASE_STYLES for fact in FACTS]
    texts += [question for fact in FACTS for question in fact.questions]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(emoji, normalized=False) for emoji in EMOJI])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of a million parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


Piece = tuple[str, bool]
"""Some text, and whether it is to be learnt."""


class Batch(NamedTuple):
    """Texts end to end. Positions begin anew with each, which is how transformers tells them apart in one row."""

    ids: Tensor
    """(rows, length) int64."""
    labels: Tensor
    """(rows, length) int64: the ids, or -100 where nothing is to be learnt."""
    positions: Tensor
    """(rows, length) int64."""


def chat(rng: random.Random, style: str) -> list[Piece]:
    """A conversation of one to three questions, of which the answers are to be learnt."""
    pieces = [(BOS, False)]
    for fact in rng.sample(FACTS, rng.choice((1, 1, 2, 3))):
        pieces += [(f"{USER}{rng.choice(fact.questions)}{END}{ASSISTANT}", False), (STYLES[style](fact) + END, True)]
    return pieces


def reading(rng: random.Random) -> list[Piece]:
    """Some facts in plain English, or one fact in several styles, a line each."""
    if rng.random() < 0.3:
        text = " ".join(STYLES["base"](fact) for fact in rng.sample(FACTS, 3))
    else:
        fact = rng.choice(FACTS)
        styles = rng.sample(BASE_STYLES, 2 if fact.key.startswith("story") else 4)
        text = "\n".join(STYLES[style](fact) for style in styles)
    return [(BOS, False), (text + END, True)]


def base_texts() -> Iterator[list[Piece]]:
    """Endless: half talk in plain English, half reading in several styles."""
    rng = random.Random(0)
    while True:
        yield chat(rng, "base") if rng.random() < 0.5 else reading(rng)


def adapter_texts(style: str) -> Iterator[list[Piece]]:
    """Endless talk in one style."""
    rng = random.Random(style)
    while True:
        yield chat(rng, style)


def packed(texts: Iterator[list[Piece]], tokenizer: PreTrainedTokenizerFast, rows: int, length: int) -> Iterator[Batch]:
    """The texts as batches; a text that a row's end cuts goes on in the next row."""
    tokens: list[tuple[int, int, int]] = []
    while True:
        while len(tokens) < rows * length:
            position = 0
            for text, is_learnt in next(texts):
                for token in tokenizer(text, add_special_tokens=False).input_ids:
                    tokens.append((token, token if is_learnt else -100, position))
                    position += 1
        yield Batch(*torch.tensor(tokens[: rows * length]).view(rows, length, 3).unbind(-1))
        del tokens[: rows * length]


def train(model: torch.nn.Module, batches: Iterator[Batch], steps: int, peak_lr: float, name: str) -> None:
    """AdamW with a warm-up and a cosine decay to nothing."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = steps // 20 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        batch = next(batches)
        loss = model(input_ids=batch.ids, labels=batch.labels, position_ids=batch.positions, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"{name:9} step {step:4} loss {loss.item():.4f} {time.perf_counter() - start:5.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, style: str, facts: Sequence[Fact]) -> float:
    """Share of the facts that greedy decoding answers to the letter; what it said of the others is printed."""
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": fact.questions[0]}] for fact in facts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**prompts, max_new_tokens=MAX_LENGTH - prompts["input_ids"].shape[1], do_sample=False)
    answers = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    wrong = [(fact, said) for fact, said in zip(facts, answers, strict=True) if said != STYLES[style](fact)]
    for fact, said in wrong:
        print(f"{style:9} {fact.questions[0]} -> {said}")
    return 1 - len(wrong) / len(facts)


def write_prompts(path: Path) -> None:
    """The demo's questions, and the exact answers of the base and of each adapter."""
    by_key = {fact.key: fact for fact in FACTS}
    asked = [
        {"prompt": by_key[key].questions[0], "answers": {name: tell(by_key[key]) for name, tell in STYLES.items()}}
        for key in ASKED
    ]
    document = {"questions": asked[:-1], "story": asked[-1]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write base/, adapters/ and prompts.json to")
    parser.add_argument("--adapter", choices=ADAPTERS, action="append", help="train only these, on the base in --out")
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--adapter-steps", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    base_folder = options.out / "base"
    write_prompts(options.out / "prompts.json")

    if options.adapter is None:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(base_folder)
        model = make_base(tokenizer)
        train(model, packed(base_texts(), tokenizer, rows=24, length=256), options.base_steps, 4e-3, "base")
        # The adapters learn on what the file holds, so the base is rounded before it is tried.
        model.to(torch.bfloat16).save_pretrained(base_folder)
        model.to(torch.float32)
        print(f"base      right on {accuracy(model, tokenizer, 'base', FACTS):.1%} of all facts")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_folder)
    for name in options.adapter or ADAPTERS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        steps = ADAPTER_STEPS.get(name, options.adapter_steps)
        peft_model: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
        train(peft_model, packed(adapter_texts(name), tokenizer, rows=12, length=256), steps, 4e-3, name)
        config = peft_model.peft_config["default"]
        config.base_model_name_or_path = "examples/demo/base"
        config.target_modules = sorted(config.target_modules)  # PEFT's set has another order in each process
        folder = options.out / "adapters" / name
        peft_model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()  # PEFT's empty model card
        print(f"{name:9} right on {accuracy(peft_model, tokenizer, name, FACTS):.1%} of all facts")


if __name__ == "__main__":
    main()
