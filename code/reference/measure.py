"""Time, memory, FLOP/s and agreement of a comparison's two implementations."""
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import closing

import torch

from system.flops import flop_counter, peak_flops, run_time
from system.memory import memory_from_shapes

MAX_SECONDS = 30  # after which the implementations are not run again


def measure(name: str, size: int, make: Callable, device: torch.device, repeats: int, limit: float,
            ) -> tuple[dict[str, str], list[str]]:
    """Measure the comparison make(size, device), and return a row of the table and notes on it.

    repeats: runs of each implementation. limit: bytes; a reference that needs more is not run. Raises AssertionError where
    the results differ by more than the comparison's tolerance.
    """
    torch.manual_seed(0)
    notes, error = [], None
    with closing(make(size, device)) as pair:
        torch.backends.cudnn.allow_tf32 = False  # the results are compared in float32: TF32 has 10 bits of mantissa
        with flop_counter() as flops:
            result, ours_memory = pair.measure_memory(pair.ours, device)  # also a warm-up, before the time is measured
        exact = pair.exact or pair.reference
        needed = {function: memory_from_shapes(function) if pair.from_shapes else 0 for function in (pair.reference, exact)}
        outcomes = {function: pair.measure_memory(function, device) for function in needed if needed[function] <= limit}
        if pair.tolerance is not None and exact in outcomes:
            error = difference(result, outcomes[exact][0])
            assert error <= pair.tolerance, f"{name} {size}: ours and reference differ by {error:.1e} of the largest value"
        if pair.remark and len(outcomes) == len(needed):
            notes.append(f"{name} {size}: {pair.remark(outcomes[pair.reference], outcomes[exact])}")
        if pair.reference in outcomes:
            functions, reference_memory = [pair.reference, pair.ours], outcomes[pair.reference][1]
        else:
            functions, reference_memory = [pair.ours], needed[pair.reference]
            notes.append(f"{name} {size}: the reference was not run, since it needs more than {limit / 1e6:,.0f} MB "
                         "(--memory); its memory is computed from shapes")
        del result, outcomes
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, as in training
        times = alternate(functions, device, repeats)
    *reference, ours = map(statistics.median, zip(*times))
    rate = flops.get_total_flops() / ours
    return {"comparison": name, "size": f"{size}", "setting": pair.setting, "runs": f"{len(times)}",
            "reference_s": significant(*reference), "ours_s": significant(ours),
            "speedup": significant(*(seconds / ours for seconds in reference)),
            "reference_MB": significant(reference_memory / 1e6), "ours_MB": significant(ours_memory / 1e6),
            "memory_ratio": significant(reference_memory / ours_memory),
            "difference": "-" if error is None else f"{error:.1e}", "TFLOP/s": significant(rate / 1e12) if rate else "-",
            "fraction_of_peak": f"{rate / peak_flops(pair.arithmetic, device):.2f}" if rate else "-"}, notes


def significant(value: float | None = None, digits: int = 3) -> str:
    """Format a number with so many significant digits, without an exponent below 10^10; a dash where there is none."""
    return "-" if value is None else f"{float(f'{value:.{digits}g}'):.10g}"


def alternate(functions: list[Callable], device: torch.device, repeats: int) -> list[list[float]]:
    """Run the functions in turn up to `repeats` times, and return the seconds of each function for each turn.

    There is at least one turn, and none begins after MAX_SECONDS.
    """
    start, times = time.perf_counter(), []
    while not times or (len(times) < repeats and time.perf_counter() - start < MAX_SECONDS):
        times.append([run_time(function, device) for function in functions])
    return times


def difference(ours: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> float:
    """Return the maximum over pairs of tensors of max |ours - reference| / max |reference|; NaN counts as infinite."""
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).nan_to_num(nan=float("inf")).item()
               for a, b in zip(ours, reference))
