"""What teams sum is counted as the device that was asked for computes, which this machine need not have."""

from optimizers.flops import read_options
from optimizers.options import complete
from pretrain.planning.traffic import _sums_of


def test_polynomials_on_a_gpu_restart_more_often_than_inverses_on_a_cpu() -> None:
    """`tight` in fp32: Gram matrices of three segments and the residual there, two Gram matrices here."""
    options = complete("matrix", {"direction": "muon", "polar_accuracy": "tight"})
    for device, sums in (("cuda", 4), ("cpu", 2)):
        read = tuple(sorted(read_options(options, device).items()))
        found = _sums_of((96, 16), 2, read, device)
        assert [elements for _, elements in found].count(16 * 16) == sums
