"""Writes a random quantised Llama of two layers as a GGUF file, for the conversion's tests."""

from pathlib import Path

import gguf
import numpy as np

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ Ġ", "Ċ Ċ", "a b")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FEED_FORWARD, HIDDEN),
    "ffn_up": (FEED_FORWARD, HIDDEN),
    "ffn_down": (HIDDEN, FEED_FORWARD),
}
HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def vocabulary() -> list[str]:
    """Special tokens, the 256 byte symbols of byte-level BPE in order, then one token a merge."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    symbols = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [*SPECIAL, *(symbols[byte] for byte in range(256)), *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(path: Path, seed: int = 0, pre_tokenizer: str = "smollm") -> dict[str, np.ndarray]:
    """Writes the file; returns the exact fp32 tensors that a reader must find, by their Hugging Face names."""
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    expected = _add_tensors(writer, np.random.default_rng(seed), len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add_tensors(writer: gguf.GGUFWriter, rng: np.random.Generator, vocab: int) -> dict[str, np.ndarray]:
    expected = {}

    def add(name: str, hf_name: str, shape: tuple[int, ...], heads: int = 0) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            expected[hf_name] = values
            return
        stored = _interleave(values, heads) if heads else values
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quantize(stored, kind), raw_dtype=kind)
        expected[hf_name] = gguf.dequantize(gguf.quantize(values, kind), kind)

    add("token_embd.weight", "model.embed_tokens.weight", (vocab, HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    for layer in range(LAYERS):
        here, there = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{here}.attn_norm.weight", f"{there}.input_layernorm.weight", (HIDDEN,))
        add(f"{here}.ffn_norm.weight", f"{there}.post_attention_layernorm.weight", (HIDDEN,))
        for name, shape in SHAPES.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name, 0)
            add(f"{here}.{name}.weight", f"{there}.{HF_NAMES[name]}.weight", shape, heads)
    return expected


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs next to each other, as GGUF stores q and k, from the two halves that transformers keeps."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
