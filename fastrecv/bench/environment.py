"""What the numbers were taken on, and what about it or about them a reader should be warned of."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import numpy as np

from fastrecv.bench.results import Flood
from fastrecv.bench.stats import MIN_BLOCKS
from fastrecv.bpf import LIBBPF_VERSION

__all__ = ["record", "warn_about_floods", "warn_about_host"]

_TICKS = os.sysconf("SC_CLK_TCK")


def record() -> dict[str, str]:
    """The environment, by name; what cannot be read here is left out."""
    cpuinfo = _read("/proc/cpuinfo")
    known = {
        "kernel": f"{os.uname().sysname} {os.uname().release} {os.uname().machine}",
        "CPU": (re.findall(r"model name\s*:\s*(.*)", cpuinfo) or ["?"])[0],
        "CPUs": str(len(os.sched_getaffinity(0))),
        "virtual machine": "yes" if re.search(r"^flags.*\bhypervisor\b", cpuinfo, re.M) else "no",
        "machine": _read("/sys/class/dmi/id/sys_vendor"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "isolated CPUs": _read("/sys/devices/system/cpu/isolated"),
        "spectre_v2": _read("/sys/devices/system/cpu/vulnerabilities/spectre_v2"),
        "clocksource": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "BPF JIT": _read("/proc/sys/net/core/bpf_jit_enable"),
        "BPF statistics": _read("/proc/sys/kernel/bpf_stats_enabled"),
        "load average": _read("/proc/loadavg").rpartition(" ")[0],
        "uptime": _read("/proc/uptime").partition(" ")[0] + " s",
        "distribution": (re.findall(r'^PRETTY_NAME="?([^"\n]*)', _read("/etc/os-release"), re.M) or [""])[0],
        "libbpf": LIBBPF_VERSION,
        "Python": platform.python_version(),
        "numpy": np.__version__,
    }
    return {name: value for name, value in known.items() if value}


def warn_about_host(environment: dict[str, str]) -> list[str]:
    """What is wrong with the machine before anything is measured."""
    warnings = []
    if environment.get("BPF JIT") == "0":
        warnings.append("the BPF JIT is off: programs are interpreted (sysctl net.core.bpf_jit_enable=1)")
    if environment.get("BPF statistics") == "1":
        warnings.append("BPF statistics are on for the whole host: every program run is slower "
                        "(sysctl kernel.bpf_stats_enabled=0)")  # fmt: skip
    if int(environment["CPUs"]) < 2:
        warnings.append("one CPU only: everything else on this machine interrupts the measurement")
    return warnings


def warn_about_floods(floods: list[Flood]) -> list[str]:
    """What is unsteady about the numbers."""
    warnings = []
    for flood in floods:
        blocks, baseline, noise = len(flood.order), flood.row("baseline"), flood.noise
        stolen = 100 * sum(flood.steal_ticks) / _TICKS / max(flood.seconds, 1e-9)
        found = [
            (
                blocks < MIN_BLOCKS,
                f"only {blocks} blocks: nothing is judged below {MIN_BLOCKS}, give it more time",
            ),
            (
                baseline.pps_sstdev >= 10,
                f"the baseline's standard deviation is {baseline.pps_sstdev:.1f} % of its mean: trust the medians and "
                "their intervals, not the means",
            ),
            (
                noise.half_width > 0.5,
                f"the A/A half-width is {noise.half_width:.2f} %, and less than that is not resolved: a quieter "
                "machine or more time would help",
            ),
            (noise.excludes(0), "the A/A row's 95 % interval excludes 0, as one in twenty does by chance"),
            (stolen > 1, f"the hypervisor took {stolen:.1f} % of the CPU's time (steal)"),
        ]
        warnings += [f"{flood.name}: {text}" for true, text in found if true]
    if any(row.share and row.share.event != "cycles" for flood in floods for row in flood.configurations):
        warnings.append("no PMU here: CPU shares are cpu-clock samples, not cycles")
    return warnings


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
