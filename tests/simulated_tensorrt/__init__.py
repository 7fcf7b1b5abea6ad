"""A test tool: the runtime half of the tensorrt_rtx module, and a card in host memory, for machines that have none.

It takes the place of NVIDIA's library where the tests of TrtSession ask for it, and shares nothing with it but the
names of what is called. An engine of it computes: it reads tensors at the addresses it was told, runs the bundle's
own graph.onnx in ONNX Runtime in fp32, and writes the results to the addresses of the outputs. So it proves calls,
addresses, lifetimes, order and the numbers of the graph. It proves neither TensorRT's arithmetic nor any speed.

It is stricter than the real one. Each of these raises `Fault`, with a sentence: an address that is unset, freed,
misaligned, too small, or of host memory; a shape outside the profile; a call before memory for activations was given,
or after shapes have changed since; a capture on the default stream; two threads in one context; a stream that reads
or overwrites what another has not finished with; a call under another card than the engine's; memory freed while a
stream that was not told of may use it.
"""

from tests.simulated_tensorrt.card import Card, Fault
from tests.simulated_tensorrt.installed import Simulated, bundle_of

__all__ = ["Card", "Fault", "Simulated", "bundle_of"]
