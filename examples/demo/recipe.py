"""Recipe: holds every number that determines the demo."""

from dataclasses import dataclass

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """One LoRA. `job` is a key of JOBS; `steps` is the length of its first training round."""

    job: str
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    steps: int
    use_rslora: bool = False


ADAPTERS = (
    AdapterRecipe("sql", 16, 32, ATTENTION + MLP, steps=140),
    AdapterRecipe("json", 16, 32, ATTENTION + MLP, steps=140),
    AdapterRecipe("mood", 8, 16, (*ATTENTION, "down_proj"), steps=120),
    AdapterRecipe("redact", 32, 64, ATTENTION + MLP, steps=140),
    AdapterRecipe("reply", 32, 16, ATTENTION + MLP, steps=140, use_rslora=True),
    AdapterRecipe("esperanto", 24, 48, ATTENTION + MLP, steps=140),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of the whole demo. A round is a warm-up and a cosine decay to almost zero.

    An adapter that gets less than `good_enough` of `num_tuning` tuning prompts exactly right is
    trained for another round of half the length at half the rate, up to `max_rounds` in all; its
    best is kept.
    """

    seed: int = 0
    vocab_size: int = 1536
    tokenizer_lessons: int = 3000
    tokenizer_names: int = 20_000  # enough that each syllable of a name becomes one token
    hidden_size: int = 256
    num_layers: int = 4
    batch_size: int = 32
    base_steps: int = 750
    base_matrix_lr: float = 6e-3  # Muon
    base_lr: float = 3e-3  # AdamW, for everything except the matrices of layers
    adapter_lr: float = 4e-3  # AdamW
    adapters: tuple[AdapterRecipe, ...] = ADAPTERS
    max_rounds: int = 8
    good_enough: float = 0.99
    num_tuning: int = 300
    num_held_out: int = 100


DEFAULT_RECIPE = Recipe()
