"""EngineConfig: the settings of one engine process. Frozen, validated here, resolved once.

Independent of YAML, HTTP and Ray: `deployments.config` nests it in the file that people write.
"""

from dataclasses import dataclass, field

DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = ("auto", "torch", "triton")
CUDA_GRAPHS = ("auto", "off")
FLASHINFER = ("auto", "off")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("none", "int8", "nf4", "int4", "fp8", "auto")
ACTIVATIONS = ("auto", "bf16", "int8")
KV_DTYPES = ("auto", "int8")
OUTPUT_LAYERS = ("auto", "int8", "model")
GENERATION_CONFIGS = ("auto", "none")
STRUCTURED_OUTPUTS = ("auto", "off")
ADAPTER_PROOFS = ("auto", "off")


SPECULATIONS = ("auto", "none", "ngram", "draft")
MAX_DRAFT_TOKENS = 64


class ConfigError(ValueError):
    """A setting is out of range; the message names the setting, its value and the range."""


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How tokens are guessed that one step verifies together, at most so many for each request."""

    method: str = "none"  # auto: ngram on a CPU, none on a GPU
    max_draft_tokens: int = 16
    model: str | None = None  # folder of the smaller model that guesses; for `draft` alone

    def __post_init__(self) -> None:
        _one_of("speculation.method", self.method, SPECULATIONS)
        most = MAX_DRAFT_TOKENS
        _between("speculation.max_draft_tokens", self.max_draft_tokens, 1, most)
        if (self.method == "draft") != (self.model is not None):
            raise ConfigError(
                f"speculation.model={self.model!r} with speculation.method={self.method!r}: a "
                f"draft model is needed with 'draft', and of no use with any other method"
            )

    def impossible_on(self, device: object) -> ConfigError:
        """Return the error of a device whose steps do not wait for each other's results."""
        return ConfigError(
            f"speculation.method={self.method!r} is not possible on {device}, where a step is "
            f"launched before the result of the one before is known; use 'none'"
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All settings for loading and scheduling one base model.

    `memory_bytes` bounds KV blocks and device-resident adapters together: each may use what the
    other does not need. `adapter_memory_bytes` is the part that adapters may use at most.
    """

    source: str  # a local Hugging Face model folder
    dtype: str = "auto"  # auto: float32 stays, everything else becomes bfloat16
    quantization: str = "none"  # of linear layers, applied while they are loaded; auto: see settle
    activations: str = (
        "auto"  # of nf4 and int4 layers; auto: int8 on a CPU. int8's always take int8
    )
    output_layer: str = "auto"  # auto: int8 beside quantized linear layers, where a CPU gains by it
    kv_dtype: str = "auto"  # auto: the model's own; int8 has a scale per position and head
    device: str = "auto"
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # None: 128, on a GPU 512
    target_step_ms: float | None = None  # while anybody decodes. None: by the time of decoding
    max_model_len: int | None = None  # None: the model's own maximum, at most 8192
    block_size: int = 16
    memory_bytes: int | None = None  # None: 2 GiB on a CPU, all but the weights on a GPU
    adapter_memory_bytes: int | None = None  # None: all but the KV blocks in use
    host_adapter_bytes: int = 2 * 2**30
    enable_prefix_caching: bool = True
    kernels: str = "auto"  # auto: native ones on a CPU, for bfloat16; Triton's on a GPU
    cuda_graphs: str = "auto"  # auto: decode steps are captured at start, on a GPU
    flashinfer: str = "auto"  # auto: computes prefills on a GPU, where it is installed and passes
    lora_side_stream: bool = False  # on a GPU: shrink concurrently with the base layer
    num_threads: int | None = None  # None: all cores
    generation_config: str = "auto"  # auto: its sampling defaults are the requests'; none: not
    max_silence_s: float = 120.0  # without news of a start or a compilation the process is killed
    structured_output: str = "auto"  # auto: where the folder has a tokenizer.json
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    adapter_proof: str = "auto"  # auto: no adapter answers before a probe has shown its effect
    enable_jump_ahead: bool = True  # on a CPU; tokens that a grammar forces are not sampled

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        _one_of("flashinfer", self.flashinfer, FLASHINFER)
        _one_of("device", self.device, DEVICES)
        _one_of("quantization", self.quantization, QUANTIZATIONS)
        _one_of("activations", self.activations, ACTIVATIONS)
        _one_of("output_layer", self.output_layer, OUTPUT_LAYERS)
        _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        _one_of("generation_config", self.generation_config, GENERATION_CONFIGS)
        _one_of("structured_output", self.structured_output, STRUCTURED_OUTPUTS)
        _one_of("adapter_proof", self.adapter_proof, ADAPTER_PROOFS)
        _between("max_num_seqs", self.max_num_seqs, 1, 4096)
        if self.max_num_batched_tokens is not None:
            _between("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
            _holds_every_decode(self.max_num_batched_tokens, self.max_num_seqs)
        if self.target_step_ms is not None:
            _between("target_step_ms", self.target_step_ms, 1, 86_400_000)
        _between("block_size", self.block_size, 1, 1024)
        if self.memory_bytes is not None:
            _between("memory_bytes", self.memory_bytes, 2**12, 2**50)
        _between("host_adapter_bytes", self.host_adapter_bytes, 0, 2**50)
        if self.max_model_len is not None:
            _between("max_model_len", self.max_model_len, 2, 2**24)
        if self.num_threads is not None:
            _between("num_threads", self.num_threads, 1, 1024)
        _between("max_silence_s", self.max_silence_s, 1, 86400)
        if self.adapter_memory_bytes is not None:
            most = self.memory_bytes or 2**50
            _between("adapter_memory_bytes", self.adapter_memory_bytes, 0, most)


def _holds_every_decode(max_num_batched_tokens: int, max_num_seqs: int) -> None:
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={max_num_batched_tokens} must be at least "
            f"max_num_seqs={max_num_seqs}: each running request decodes a token per step"
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} is outside {low}..{high}")
