#!/usr/bin/env python3
"""Makes the demo's base model: tokenizer and a small Llama, trained from nothing on corpus.py.

usage: pretrain.py [--out DIR] [--steps N]

One thread, fixed seeds; the result is the same on the same machine and library versions.
"""
import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corpus

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
VOCABULARY = 1024
BATCH = 64
RATE = 4e-3
WARM_UP = 100


def render(messages):
    """Chat template, written out (the template itself is checked against this)."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def make_tokenizer(texts):
    """Byte-level BPE trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, model_max_length=512, chat_template=TEMPLATE)


def make_model(vocabulary):
    """A Llama of about one million parameters; every dimension is a multiple of 64, the NF4 block."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    torch.manual_seed(corpus.SEED)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def batches(rows):
    """Groups rows of similar length, then visits the groups in a seeded order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = [order[i:i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
    random.Random(corpus.SEED + 4).shuffle(groups)
    for group in groups:
        width = max(len(rows[i]) for i in group)
        ids = torch.zeros(BATCH, width, dtype=torch.long)
        labels = torch.full((BATCH, width), -100)
        for k, i in enumerate(group):
            row = torch.tensor(rows[i])
            ids[k, :len(row)] = row
            labels[k, :len(row)] = row
        yield ids, labels


def rate_at(step, steps):
    """Linear warm-up, then a cosine down to zero."""
    if step < WARM_UP:
        return RATE * (step + 1) / WARM_UP
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def train(model, rows):
    """Next-token loss on whole conversations. No mask is needed: rows are padded on the right."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=RATE, betas=(0.9, 0.98))
    steps = len(rows) // BATCH
    start, tokens = time.time(), 0
    for step, (ids, labels) in enumerate(batches(rows)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int((labels != -100).sum())
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}/{steps} loss {loss.item():.4f} {tokens / (time.time() - start):.0f} tokens/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "testdata/demo/model")
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    chats = corpus.conversations(args.steps * BATCH)
    texts = [render(chat) for chat in chats]
    tokenizer = make_tokenizer(texts[:40000])
    assert tokenizer.apply_chat_template(chats[0], tokenize=False) == texts[0]
    rows = [encoding.ids for encoding in tokenizer._tokenizer.encode_batch(texts)]
    model = make_model(len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens, "
          f"{sum(map(len, rows)) / len(rows):.1f} tokens a conversation", flush=True)
    train(model, rows)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
