"""Sizes of the models that the benchmarks use. The weights are random: only the shape costs time and memory."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    family: str  # model_type of config.json
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    theta: float
    eps: float = 1e-5
    positions: int = 32768

    @property
    def head_dim(self):
        return self.hidden // self.heads

    @property
    def qkv_bias(self):
        return self.family == "qwen2"

    def linears(self):
        """(name, inputs, outputs) of a block's linear layers, as they are computed."""
        kv = self.kv_heads * self.head_dim
        return [
            ("self_attn.q_proj", self.hidden, self.hidden),
            ("self_attn.k_proj", self.hidden, kv),
            ("self_attn.v_proj", self.hidden, kv),
            ("self_attn.o_proj", self.hidden, self.hidden),
            ("mlp.gate_proj", self.hidden, self.intermediate),
            ("mlp.up_proj", self.hidden, self.intermediate),
            ("mlp.down_proj", self.intermediate, self.hidden),
        ]

    def parameters(self):
        block = sum(i * o for _, i, o in self.linears()) + 2 * self.hidden
        biases = sum(o for _, _, o in self.linears()[:3]) if self.qkv_bias else 0
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (block + biases) + embeddings + self.hidden

    def config(self, dtype):
        """config.json as transformers writes it; the last two ids are padding and end of text."""
        return {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.family]],
            "model_type": self.family, "dtype": dtype, "hidden_act": "silu", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "max_position_embeddings": self.positions, "rms_norm_eps": self.eps,
            "rope_theta": self.theta, "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "tie_word_embeddings": self.tied, "vocab_size": self.vocab, "bos_token_id": None,
            "eos_token_id": self.vocab - 1, "pad_token_id": self.vocab - 2,
        }


SHAPES = {
    "smollm2-135m": Shape("llama", 30, 576, 9, 3, 1536, 49152, True, 100000.0),
    # For trying the scripts.
    "tiny": Shape("llama", 2, 64, 4, 2, 160, 512, True, 10000.0),
    # With rows of whole NF4 blocks, as bitsandbytes wants them on a processor.
    "tiny-nf4": Shape("llama", 2, 64, 4, 2, 192, 512, True, 10000.0),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 4864, 151936, True, 1000000.0, 1e-6),
    "llama3.2-1b": Shape("llama", 16, 2048, 32, 8, 8192, 128256, True, 500000.0),
    # Mistral 7B v0.3; its decoder is Llama's.
    "mistral-7b": Shape("llama", 32, 4096, 32, 8, 14336, 32768, False, 1000000.0),
    # Its positions are not stretched: that costs nothing.
    "llama3.1-8b": Shape("llama", 32, 4096, 32, 8, 14336, 128256, False, 500000.0),
    "qwen2.5-14b": Shape("qwen2", 48, 5120, 40, 8, 13824, 152064, False, 1000000.0, 1e-6),
    "qwen2.5-32b": Shape("qwen2", 64, 5120, 40, 8, 27648, 152064, False, 1000000.0, 1e-6),
}
