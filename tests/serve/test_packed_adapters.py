"""Adapters served from a pack of any layout answer as PEFT does with the originals."""

import dataclasses
from pathlib import Path

import pytest
from cases import draw_batches, draw_cases
from many_adapters import ADAPTERS
from served import compare
from vllm.lora.request import LoRARequest

from lvnas.adapters import read_adapter
from lvnas.pack import pack
from lvnas.prepare import PackOptions

LAYOUTS = ("pad", "group", "ragged")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def packed_engine(engine, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """The shared engine, which also knows every adapter from a pack of each layout, as `<layout>/<name>`."""
    before = dict(engine.adapters)
    sources = [read_adapter(path, name) for name, path in adapters.items()]
    for layout in LAYOUTS:
        out = tmp_path_factory.mktemp("packs") / layout
        for entry in pack(sources, out, PackOptions(layout=layout))["adapters"]:
            name = f"{layout}/{entry['name']}"
            number = 1 + max(request.lora_int_id for request in engine.adapters.values())
            engine.adapters[name] = LoRARequest(name, number, str(out / entry["path"]))
    yield engine
    engine.adapters = before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_adapters_answer_as_peft(packed_engine, oracle, layout: str) -> None:
    names = [None, *ADAPTERS]
    drawn = draw_cases(LAYOUTS.index(layout), 36, names)
    cases = [dataclasses.replace(case, adapter=names[i % len(names)]) for i, case in enumerate(drawn)]
    problems = []
    for batch in draw_batches(7, cases):
        served = [
            dataclasses.replace(case, adapter=f"{layout}/{case.adapter}") if case.adapter else case
            for case in batch
        ]
        for case, output in zip(batch, packed_engine.generate(served), strict=True):
            same, worst = compare(oracle, case, output)
            if not same or worst > TOLERANCE:
                problems.append((case.text, case.adapter, same, worst))
    assert not problems, f"{len(problems)} of {len(cases)} cases differ: {problems[:5]}"
