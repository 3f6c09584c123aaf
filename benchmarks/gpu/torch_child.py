"""PyTorch's scaled_dot_product_attention on the same dense works, in a process of its own.

    python -m benchmarks.gpu.torch_child < works.json     # a line of JSON for each figure

Its flash and cuDNN forms, timed by CUDA events around many calls; calibrated on the same product
and the same copy as jax (`calibrate`), so that the two harnesses can be compared. On a machine
without CUDA it runs on the processor, by the wall's clock: a test of this file, not a figure.
"""

import json
import statistics
import sys
import time
from typing import Any

from benchmarks.work import Work

FORMS = {"torch flash": "FLASH_ATTENTION", "torch cudnn": "CUDNN_ATTENTION"}
ROUNDS, WINDOW_S = 5, 0.03


def main() -> None:
    """Answers the works on stdin."""
    works = [Work(**given) for given in json.load(sys.stdin)]
    _say({"calibration": calibrated()})
    for work in works:
        for row in timed(work):
            _say(row)


def _say(said: dict[str, Any]) -> None:
    sys.stdout.write("\n" + json.dumps(said) + "\n")
    sys.stdout.flush()


def timed(work: Work) -> list[dict[str, Any]]:
    """Every form at one work; the forms take turns."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, length = len(work.q_lens), max(work.q_lens)
    shapes = (
        (work.num_heads, work.head_size), (work.num_kv_heads, work.head_size),
        (work.num_kv_heads, work.head_size_v), (work.num_heads, work.head_size_v),
    )  # fmt: skip
    q, k, v, dout = (
        torch.randn(batch, heads, length, size, device=device, dtype=torch.bfloat16)
        for heads, size in shapes
    )
    found, calls = [], {}
    for name, form in FORMS.items():
        try:
            calls[name] = _call(torch, form, work, (q, k, v), dout)
            calls[name]()
        except RuntimeError as error:
            del calls[name]
            reason = str(error).splitlines()[0][:300]
            found.append({"work": work.name, "contender": name, "verdict": "failed",
                          "reason": reason})  # fmt: skip
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(_seconds(torch, call))
    for name, seconds in samples.items():
        middle = statistics.median(seconds)
        found.append({
            "work": work.name, "contender": name, "verdict": "timed", "seconds": middle,
            "low": min(seconds), "high": max(seconds), "samples": len(seconds),
            "tflops": work.flops / middle / 1e12,
        })  # fmt: skip
    return found


def _call(torch: Any, form: str, work: Work, qkv: tuple[Any, ...], dout: Any) -> Any:
    """The call as a function of nothing; with the backward pass if the work has one."""
    attention = torch.nn.attention
    gqa = work.num_heads != work.num_kv_heads

    def forward(*qkv: Any) -> Any:
        with attention.sdpa_kernel(getattr(attention.SDPBackend, form)):
            return torch.nn.functional.scaled_dot_product_attention(
                *qkv, is_causal=work.causal, scale=work.scale, enable_gqa=gqa
            )

    if not work.backward:
        return lambda: forward(*qkv)
    leaves = [x.requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(forward(*leaves), leaves, dout)


def _seconds(torch: Any, call: Any) -> float:
    """Seconds of one call among as many as fill the window."""
    begin = time.perf_counter()
    call()
    _finish(torch)
    count = max(2, min(200, round(WINDOW_S / (time.perf_counter() - begin))))
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / count * 1e-3


def _finish(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def calibrated() -> dict[str, float]:
    """TFLOP/s of an 8192-cube bfloat16 product on random numbers, GB/s of a 4 GB copy."""
    import torch

    if not torch.cuda.is_available():
        return {}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    block = torch.empty(1 << 30, device="cuda", dtype=torch.float32).normal_()
    other = torch.empty_like(block)
    product = statistics.median(_seconds(torch, lambda: a @ b) for _ in range(ROUNDS))
    copy = statistics.median(_seconds(torch, lambda: other.copy_(block)) for _ in range(ROUNDS))
    return {"tflops": 2 * 8192**3 / product / 1e12, "gbytes": 2 * 4 * (1 << 30) / copy / 1e9}


if __name__ == "__main__":
    main()
