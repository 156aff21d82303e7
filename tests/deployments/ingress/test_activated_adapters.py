"""Activated LoRAs over HTTP with a real engine: peft's text, and one context read once."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tests.deployments.support.fakes import Server, in_server
from tests.deployments.support.real_engine import FolderStore, RealEngine
from tests.engine.support.driver import write_adapters
from tests.engine.support.tiny import load_reference, write_tiny

CONTEXT = "A customer asks for a green candle, and wants to know when it comes. " * 2
CALLS = {"red": "[is it safe?]", "blue": "[is it true?]"}


def test_two_adapters_answer_as_with_peft_over_a_context_that_is_read_once(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "base", "qwen3", vocab_size=258, eos_token_id=256)
    alora: dict[str, dict[str, Any]] = {
        name: {"alora_invocation_tokens": list(call.encode()), "task_type": "CAUSAL_LM"}
        for name, call in CALLS.items()
    }
    adapters = write_adapters(tiny.folder, tmp_path, alora)

    @torch.inference_mode()
    def by_peft(name: str, prompt: str) -> list[int]:
        base = load_reference(tiny.folder, torch.float32)
        model = PeftModel.from_pretrained(base, adapters[name].path).eval()
        base.generation_config.eos_token_id = None
        ids = torch.tensor([list(prompt.encode())])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=[256, 257],  # they are no bytes
        )
        return made[0, ids.shape[1] :].tolist()

    async def test(server: Server) -> None:
        cached: list[int] = []
        for model, call in ("base", ""), *CALLS.items():
            answer = await server.post(
                "/v1/completions",
                model=model,
                prompt=CONTEXT + call,
                max_tokens=12,
                temperature=0,
                ignore_eos=True,
                return_token_ids=True,
                logit_bias={"256": -100, "257": -100},
            )
            assert answer.status == 200, answer.body
            cached.append(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])
            if model != "base":
                token_ids = answer.json["choices"][0]["token_ids"]
                assert token_ids == by_peft(model, CONTEXT + call)
        assert cached == [0, len(CONTEXT) // 4 * 4, len(CONTEXT) // 4 * 4]

    store = FolderStore(**{name: Path(a.path) for name, a in adapters.items()})
    in_server(test, engine=RealEngine(tiny.folder), store=store)
