"""Measures many adapters in one batch: transformers with peft, then Reef, on the same GPU."""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.bench.gpu_clock import release
from tests.bench.gpu_report import Goal, Row, missing
from tests.bench.gpu_runner import RANK, Bench, paces, sizes_of
from tests.bench.gpu_setting import Setting
from tests.bench.models import write_config

ROWS = 32
NEW_TOKENS = (4, 28)  # the difference in time is decoding alone


def beside_peft(setting: Setting) -> Iterator[Row]:
    rows = min(ROWS, max(sizes_of(setting).batches))
    name = f"decode x{rows}, {rows} adapters of rank {RANK}"
    try:
        import peft
    except ImportError:
        yield missing(name, "peft is not installed", "6")
        return
    theirs = _peft_tokens_per_s(setting, rows)
    release(setting.device)
    yield Row(f"peft: {name}", theirs, "tokens/s", note=f"peft {peft.__version__}")
    bench = Bench(setting, "none")
    lane = bench.lane(rows)
    lane.load([RANK] * rows)
    slots = list(range(1, rows + 1))
    ours = rows / paces({"": (lane, slots)}, bench.sizes.rounds)[""].step_s
    goal = Goal(ours / theirs, "peft's", at_least=15.0, target="6")
    yield Row(f"ours: {name}", ours, "tokens/s", goal)


@torch.inference_mode()
def _peft_tokens_per_s(setting: Setting, rows: int) -> float:
    """Time `generate(adapter_names=...)` of rows of equal context, each with its own adapter."""
    model = _peft_model(setting, rows)
    context = sizes_of(setting).context
    prompt = torch.randint(3, setting.shape.vocab_size, (rows, context), device=setting.device)
    names = [f"a{i}" for i in range(rows)]

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            adapter_names=names,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(NEW_TOKENS[0])
    few, many = (seconds(count) for count in NEW_TOKENS)
    return rows * (NEW_TOKENS[1] - NEW_TOKENS[0]) / (many - few)


def _peft_model(setting: Setting, num_adapters: int):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with TemporaryDirectory() as folder:
        write_config(setting.shape, Path(folder))
        config = AutoConfig.from_pretrained(folder)
    with torch.device(setting.device):
        base = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
    modules = [module.rpartition(".")[2] for module in setting.shape.linears]
    lora = LoraConfig(r=RANK, target_modules=modules, init_lora_weights=False)
    with torch.device(setting.device):  # draw on the device too
        model = get_peft_model(base.eval(), lora, adapter_name="a0")
        for i in range(1, num_adapters):
            model.add_adapter(f"a{i}", lora)
    return model.to(setting.dtype).eval()
