#!/usr/bin/env python3
"""Writes the fixtures of the engine's tests with transformers, the reference implementation.

Usage: reference.py TINY_R1_FOLDER      (needs torch and transformers; seen with 2.15 and 5.23)

For each model: `MODEL/expected.safetensors` with the tokens of some prompts (`NAME.tokens`) and the
logits of every position (`NAME.logits`), computed in float32 from the weights as stored. The two
random models are written as well, in float32 and float16; their shapes differ where a mistake would
not show in tiny-r1. The greedy answer of tiny-r1 goes to `tiny-r1/answer.json`.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

COMMON = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.5,
}

# Spelt as transformers 4 does: YaRN in `rope_scaling`, biases, ranks and heads of odd sizes.
YARN = COMMON | {
    "vocab_size": 61, "hidden_size": 44, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "intermediate_size": 70, "moe_intermediate_size": 13, "n_shared_experts": 1,
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3,
    "norm_topk_prob": True, "num_attention_heads": 3, "num_key_value_heads": 3,
    "q_lora_rank": 19, "kv_lora_rank": 23, "qk_nope_head_dim": 11, "qk_rope_head_dim": 10,
    "v_head_dim": 9, "attention_bias": True, "tie_word_embeddings": False,
    "max_position_embeddings": 160, "torch_dtype": "float32", "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn", "factor": 5.0, "original_max_position_embeddings": 32,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7,
    },
}

# Spelt as transformers 5 does: no bottleneck for queries, tied head, other groups, halves rotated.
GROUPED = COMMON | {
    "vocab_size": 83, "hidden_size": 56, "num_hidden_layers": 2, "first_k_dense_replace": 0,
    "intermediate_size": 64, "moe_intermediate_size": 20, "n_shared_experts": 2,
    "n_routed_experts": 12, "n_group": 4, "topk_group": 3, "num_experts_per_tok": 5,
    "norm_topk_prob": False, "num_attention_heads": 2, "num_key_value_heads": 2,
    "q_lora_rank": None, "kv_lora_rank": 40, "qk_nope_head_dim": 24, "qk_rope_head_dim": 6,
    "v_head_dim": 17, "attention_bias": False, "tie_word_embeddings": True,
    "max_position_embeddings": 128, "dtype": "float16", "rope_interleave": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


def write_model(folder, config, dtype):
    """Writes a model of random weights whose activations neither vanish nor grow."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_pretrained(folder))
    for name, weight in model.named_parameters():
        scale = 0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        offset = 1.0 if "norm" in name else 0.0
        weight.data = torch.randn_like(weight) * scale + offset
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


@torch.no_grad()
def expect(folder, source, prompts):
    """Writes tokens and logits of the prompts; returns the model."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = DeepseekV3ForCausalLM.from_pretrained(source, dtype=torch.float32, **plain).eval()
    tensors = {}
    for name, tokens in prompts.items():
        tensors[f"{name}.tokens"] = torch.tensor(tokens, dtype=torch.int64)
        tensors[f"{name}.logits"] = model(torch.tensor([tokens])).logits[0].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "expected.safetensors")
    return model


def random_prompts(vocab, lengths):
    return {f"random-{n}": torch.randint(0, vocab, (n,)).tolist() for n in lengths}


def tiny_r1(source):
    folder, tokenizer = FIXTURES / "tiny-r1", AutoTokenizer.from_pretrained(source)

    def chat(question):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = {
        "sum": chat("What is 47 + 85?"),
        "other-sum": chat("What is 9 + 16?"),
        "text": tokenizer("A plain text, without a question.", add_special_tokens=False)["input_ids"],
    }
    model = expect(folder, source, prompts | random_prompts(512, [40]))
    prompt = prompts["sum"]
    found = model.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False)
    answer = found[0, len(prompt):].tolist()
    thought, _, said = tokenizer.decode(answer, skip_special_tokens=False).partition("</think>")
    assert said.replace(tokenizer.eos_token, "").strip() == "132", said
    tail = tokenizer("132", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert answer[-len(tail):] == tail, (answer, tail)
    facts = {"prompt": prompt, "answer": answer, "says_132": tail}
    (folder / "answer.json").write_text(json.dumps(facts) + "\n")


def main():
    torch.manual_seed(47)
    for name, config, dtype in [("yarn", YARN, torch.float32), ("grouped", GROUPED, torch.float16)]:
        folder = FIXTURES / name
        write_model(folder, config, dtype)
        expect(folder, folder, random_prompts(config["vocab_size"], [1, 17, 100]))
    tiny_r1(pathlib.Path(sys.argv[1]))


if __name__ == "__main__":
    main()
