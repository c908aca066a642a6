"""The paths that a call can take, each a runner of its own: run(call, route) gives what lstm() returns."""

from . import composed, in_graph, kernels, one_step, torch_lstm

RUN = {
    "kernels": kernels.run,
    "one step": one_step.run,
    "torch": torch_lstm.run,
    "in graph": in_graph.run,
    "composed": composed.run,
}
