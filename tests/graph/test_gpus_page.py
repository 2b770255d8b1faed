"""The programs of docs/gpus.md without a GPU: the layer on the host, and all of `ahead.py` but the compilation.

`./task gpu-compile` compiles the layer's graph for GPUs, tests/gpu/test_page_program.py runs it there.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

from graph import together
from page_programs import AHEAD, HOME, LAYER, LIMIT, ROOT, load_layer

import ep_mojo as ep


@together.needed
def _add_layer(module):
    layer = load_layer(module)
    comm = ep.Communicator.cpu(layer.config(2))
    return comm, {"layer": layer.graph(comm)}


class OnTheHost:
    """A model of the host, whose "replays" are runs that fill the outputs of the "captured" one."""

    def __init__(self, model, host):
        self.execute, self.host, self.calls = model.execute, host, []

    def capture(self, key, *args):
        self.calls.append(("capture", key))
        self.captured, self.outputs = args, self.execute(*args)
        return self.outputs

    def replay(self, key, *args):
        self.calls.append(("replay", key))
        assert all(a is b for a, b in zip(args, self.captured, strict=True))
        self.host.synchronize()  # on the host a copy is under way when inplace_copy_from returns, and nothing waits
        for old, new in zip(self.outputs, self.execute(*args), strict=True):
            old.inplace_copy_from(new)
        self.host.synchronize()

    def release_captured_graph(self, key):
        self.calls.append(("release", key))


def test_the_layer(together):
    comm, compiled = together["layer"]
    layer = load_layer()
    given = layer.draw(2, 0)
    out = comm.execute(compiled, *given)
    assert layer.error(given, out) < LIMIT
    assert layer.error(layer.draw(2, 1), out) > 0.5


def test_its_replays(together):
    """Other tokens, and another number of them, through buffers that stay."""
    from max.driver import CPU

    comm, compiled = together["layer"]
    host = CPU()
    model = OnTheHost(compiled.model, host)
    ranks = SimpleNamespace(cfg=comm.cfg, devices=[host] * 2, inputs=comm.inputs, check=comm.check)
    errors = load_layer().replays(ranks, model, range(1, 4))
    assert len(errors) == 3
    assert max(errors) < LIMIT
    assert model.calls == [("capture", 1), *[("replay", 1)] * 3, ("release", 1)]


def test_compiling_ahead(tmp_path):
    """As far as MAX is given the graph; then what the folder would be used for, with GPUs that are only planned."""
    for name, code in (("layer", LAYER), ("ahead", AHEAD), ("home", HOME)):
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "check.py").write_text(
        "import sys, runpy, max.driver, max.engine, ep_mojo as ep\n"
        "def load(self, graph):\n"
        "    print(graph.name, len(graph.inputs), *[d.label for d in self.devices], flush=True)\n"
        "max.engine.InferenceSession.load = load\n"
        "sys.argv = ['ahead.py', '2', 'sm_90a']\n"
        "runpy.run_path('ahead.py')\n"
        "assert max.driver.get_virtual_device_target_arch() == 'sm_90a'\n"
        "class Session:\n"
        "    def __init__(self, devices, precompiled_mefs):\n"
        "        self.devices = devices; print(precompiled_mefs, flush=True)\n"
        "    load = load\n"
        "max.engine.InferenceSession = Session\n"
        "def gpus(cfg):\n"
        "    comm = ep.Communicator.planned(cfg)\n"
        "    comm.devices = [max.driver.Accelerator(r) for r in range(cfg.n_ranks)]\n"
        "    return comm\n"
        "ep.Communicator.gpus = gpus\n"
        "import layer\n"
        "layer.replays = lambda comm, model, seeds: 'replayed'\n"
        "runpy.run_path('home.py')\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    n_inputs = 4 * 2 + 7 + 2 + 2
    graph = f"layer {n_inputs} cpu gpu gpu"
    assert done.stdout.splitlines() == [graph, "mefs", graph, "replayed"]
