"""The program of docs/gpus.md on all GPUs, and what the page says of captured graphs after a failure."""

import re

import numpy as np
import pytest
from gpu import programs
from page_programs import LAYER, LIMIT, load_layer

import ep_mojo as ep


def test_the_program(tmp_path):
    (tmp_path / "layer.py").write_text(LAYER)
    done = programs.run(tmp_path / "layer.py", timeout=500)
    assert re.findall(r"^(\w+) ", done.stdout, re.MULTILINE) == ["once", "replayed"]
    errors = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d+)?", done.stdout)]
    assert len(errors) == 6
    assert 0 < min(errors) <= max(errors) < LIMIT


def test_a_captured_graph_outlives_a_failure_and_a_reset():
    from max.driver import accelerator_count

    layer, n = load_layer(), min(accelerator_count(), 8)
    R = max(n, 2)
    with ep.Communicator.gpus(layer.config(n)) if n > 1 else ep.Communicator.one_gpu(layer.config(R)) as comm:
        model = comm.compile(layer.graph(comm)).model
        fixed = layer.put(comm, layer.draw(R, 0))
        args = [*fixed, *comm.inputs()]
        model.execute(*args)
        comm.check()
        outputs = model.capture(1, *args)

        def replay(given):
            for buffer, new in zip(fixed, layer.put(comm, given), strict=True):
                buffer.inplace_copy_from(new)
            model.replay(1, *args)
            comm.check()
            return layer.error(given, outputs)

        for seed in range(1, 5):
            assert replay(layer.draw(R, seed)) < LIMIT
            bad = layer.draw(R, seed)
            bad[-1] = np.array([layer.T + 1], np.int32)
            for _ in range(2):  # on record until reset
                with pytest.raises(ep.ShapeError, match=f"num_tokens = {layer.T + 1}: rank {R - 1}"):
                    replay(bad)
            comm.reset()
        assert replay(layer.draw(R, 9)) < LIMIT
        outputs.clear()
        model.release_captured_graph(1)
