"""Writes the hardware profiles from the measurements beside them.

    python scripts/fit_hardware.py [FOLDER]

reads `models/hardware/measurements/*.csv` and writes one TOML per card, and the table of the RTX
3090 fit as `rtx-3090-fit.md`, into FOLDER (default `models/hardware/`). Same input, same bytes.
The column `used_for` says which row feeds which constant. Several rows of one rig count as one,
their median, and a constant is the median over rigs.
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from moejax.cards import CONSTANT_NAMES, Constant, Hardware, models_dir
from moejax.cost import CsvFit, fit_csv, format_fit, format_profile, read_csv

MEASUREMENTS = models_dir() / "hardware" / "measurements"
HEADER = """Written by scripts/fit_hardware.py from measurements/*.csv: change those, run it again.
kind: fitted, measured, derived (arithmetic on measured values), datasheet or assumed.
Time is seconds, size is bytes, 1 GB is 1e9 bytes."""
OWN = "measured by the authors on an H100 80GB, jax 0.11.2, 2026-11"
SOURCE = "models/hardware/measurements/*.csv; a source per constant"
PARTLY = "Constants of kind assumed are those of the named profile: no measurement of this card."
TEXTS = {
    "rtx-3090": (
        "NVIDIA RTX 3090 24 GB, fitted to published third-party RTX 3090 measurements",
        "None of these values was measured by the authors. The copy law comes from one desktop"
        " (Core Ultra 9 285K, Windows 11), host constants partly from servers. Copies are in CUDA"
        " event time; a host that submits one and waits sees 6 us more (10 to 13 us at 4 KiB)."
        " The kernels of moejax have not run on this card.",
    ),
    "rtx-4090": (
        "NVIDIA RTX 4090 24 GB, published measurements, the rest as on an RTX 3090",
        PARTLY,
    ),
    "a100-40gb": (
        "NVIDIA A100 40 GB, published measurements, the rest as on an RTX 3090",
        PARTLY,
    ),
    "a100-80gb": (
        "NVIDIA A100 80 GB, published measurements, the rest as on an RTX 3090",
        PARTLY,
    ),
    "h100": (
        "NVIDIA H100 80 GB, link and kernels measured by the authors",
        "Link and kernel constants describe decode as one device program that reads missed experts"
        " itself; host constants were not measured.",
    ),
    "h200": ("NVIDIA H200 141 GB, published measurements, the rest as on an H100", PARTLY),
}
TABLE_TITLE = "Copy law of the RTX 3090, fitted to published third-party measurements"
COLUMNS = {
    "transfer.csv": ("gb_per_s", 1e9),
    "compute.csv": ("tflops", 1e12),
    "latency.csv": ("microseconds", 1e-6),
    "engine.csv": ("value", 1.0),
}

Constants = dict[str, Constant]


class Quote(NamedTuple):
    """One published value in base units."""

    value: float
    rig: str
    source: str
    fields: dict[str, str]


def main() -> None:
    """Writes every profile and the fit table."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else models_dir() / "hardware"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in profile_files().items():
        (folder / name).write_text(text, encoding="utf-8")


def profile_files() -> dict[str, str]:
    """File name and content of everything this script writes."""
    # The base profile of the fit is empty: this is what makes the profile of that name.
    empty = Hardware("rtx-3090", "", MappingProxyType({}))
    fit = fit_csv(MEASUREMENTS / "transfer.csv", gpu="RTX 3090", base=empty)
    rtx_3090 = _rtx_3090(fit)
    h100 = _h100()
    h100 |= _assumed_from(rtx_3090, "rtx-3090", h100)
    constants = {"rtx-3090": rtx_3090, "h100": h100}
    for name, base in (("rtx-4090", "rtx-3090"), ("a100-40gb", "rtx-3090"), ("h200", "h100")):
        own = _published(name)
        constants[name] = own | _assumed_from(constants[base], base, own)
    own = _published("a100-80gb")
    link = "pinned_h2d_bytes_per_s"
    own |= _assumed_from({link: constants["a100-40gb"][link]}, "a100-40gb", own)
    constants["a100-80gb"] = own | _assumed_from(rtx_3090, "rtx-3090", own)
    files = {}
    for name, (title, note) in TEXTS.items():
        ordered = {key: constants[name][key] for key in CONSTANT_NAMES if key in constants[name]}
        hardware = Hardware(name, title, MappingProxyType(ordered), SOURCE, note)
        files[f"{name}.toml"] = format_profile(hardware, header=HEADER)
    return files | {"rtx-3090-fit.md": format_fit(fit, title=TABLE_TITLE)}


def _published(name: str) -> Constants:
    """Constants of a card that are medians of published values, and its datasheet."""
    found: Constants = {}
    for file, key, unit in (
        ("transfer.csv", "vram_bytes_per_s", "B/s"),
        ("compute.csv", "matmul_flops", "FLOP/s"),
        ("transfer.csv", "pinned_h2d_bytes_per_s", "B/s"),
        ("transfer.csv", "pageable_h2d_bytes_per_s", "B/s"),
        ("transfer.csv", "host_copy_bytes_per_s", "B/s"),
        ("transfer.csv", "nvme_bytes_per_s", "B/s"),
    ):
        quotes = _quotes(file, name, key)
        if quotes:
            found[key] = _median(quotes, unit)
    sheet = next(fields for _, fields in _rows("datasheet.csv") if fields["profile"] == name)
    note = f"{sheet['vram_gb']} GB, GB read as 1e9 bytes"
    vram_bytes = float(sheet["vram_gb"]) * 1e9
    if "24,576 MiB" in sheet["note"]:
        vram_bytes, note = 24576 * 2.0**20, "24,576 MiB by nvidia-smi"
    found["vram_bytes"] = Constant(vram_bytes, "B", "datasheet", None, f"{note}; {sheet['source']}")
    if sheet["launch_price_usd"]:
        price = float(sheet["launch_price_usd"])
        source = f"launch price; {sheet['source'].split(';')[0]}"
        found["price_usd"] = Constant(price, "USD", "datasheet", None, source)
    return found


def _rtx_3090(fit: CsvFit) -> Constants:
    name = "rtx-3090"
    latency_s = _rounded(fit.copy.latency_s)
    copy_source = (
        f"latency + bytes / bandwidth fitted to {len(fit.copy.rows)} sizes of one rig"
        " (github.com/WorldOfEpoch/Sidecar @969c5c5b), pinned host to device, CUDA event time,"
        " every third size held out"
    )
    loaded = _quotes("transfer.csv", name, "contention_ratio")
    idle = max(quote.value for quote in loaded)
    busy = [quote.value for quote in loaded if quote.value < idle]
    slowdowns = _quotes("latency.csv", name, "overlap_ratio")
    hidden = [1.0 - quote.value / _overlapped_copy_s(fit, quote) for quote in slowdowns]
    (layer,) = _quotes("latency.csv", name, "layer_fixed_s")
    (cpu_fixed,) = _quotes("latency.csv", name, "host_expert_fixed_s")
    (cpu_expert,) = _quotes("latency.csv", name, "host_read_bytes_per_s")
    (ramped,) = _quotes(
        "engine.csv", "h100", "kernel_efficiency_ratio of cards without a measurement"
    )
    (peak,) = _quotes("engine.csv", "h100", "vram_bytes_per_s")
    nvme = _quotes("transfer.csv", name, "nvme_bytes_per_s")
    shortest = min(nvme, key=lambda quote: float(quote.fields["bytes"]))
    queued_s = float(shortest.fields["seconds"])
    bound_s = queued_s - float(shortest.fields["bytes"]) / shortest.value
    return _published(name) | {
        "kernel_efficiency_ratio": _derived(
            ramped.value / peak.value,
            "1",
            f"no bf16 expert kernel of this card is published; ratio of the expert kernel to the"
            f" largest read, {OWN}. A 3-bit kernel calibrated on an RTX 3090 reaches 412 GB/s,"
            f" 0.49: it is bound by decoding its format (github.com/0xSero/moetier @a10d0b80)",
        ),
        "layer_fixed_s": _derived(
            layer.value,
            "s",
            "routed MoE kernel of one engine, calibrated on decode, taken for a whole layer; the"
            " same author also measures 170 us with all experts resident, so it may count expert"
            " reads twice. A single-program engine needs 22 us on an H100, and then prefetch has"
            f" less compute to hide behind; {layer.source}",
        ),
        "step_fixed_s": Constant(
            1e-4,
            "s",
            "assumed",
            None,
            "embedding, sampling and hand-over; the published step boundary of 1900 us also holds"
            " the head and three dense layers of another model (github.com/0xSero/moetier)",
        ),
        "copy_latency_s": Constant(
            latency_s,
            "s",
            "fitted",
            _rounded(fit.copy.latency_standard_error_s, 3),
            f"{copy_source}; the error is dominated by the quoted range of 4.1 to 7.4 us at 4 KiB",
        ),
        "pinned_h2d_bytes_per_s": Constant(
            _rounded(fit.copy.bytes_per_s),
            "B/s",
            "fitted",
            _rounded(fit.copy.bytes_per_s_standard_error, 3),
            copy_source,
        ),
        "contention_ratio": _derived(
            statistics.geometric_mean(busy) / idle,
            "1",
            "15 and 14.5 GB/s while the CPU reads experts over 25.5 GB/s idle, one rig;"
            f" {loaded[0].source}",
        ),
        "pageable_latency_s": _derived(
            latency_s + 6e-6,
            "s",
            "copy_latency_s and the 6 us between CUDA event and end-to-end time of a 4 MiB pageable"
            " copy (214.0 and 220.0 us); github.com/WorldOfEpoch/Sidecar @969c5c5b",
        ),
        "nvme_latency_s": _derived(
            bound_s,
            "s",
            "upper bound: a queue of 8 reads of 256 KiB keeps the drive full, so by Little's law"
            f" latency + bytes / bandwidth is at most 0.294 ms; {shortest.source}",
        ),
        "host_read_bytes_per_s": _derived(
            9474048 / cpu_expert.value,
            "B/s",
            "9.474048 MB expert in 104 us on an EPYC 7443P with 22 threads (its memory reads"
            f" 138 GB/s; desktops of other RTX 3090 rigs read 25 to 42 GB/s); {cpu_expert.source}",
        ),
        "host_expert_fixed_s": _derived(
            cpu_fixed.value,
            "s",
            f"hand-off 35, launch 110 us of a layer, charged to each expert; {cpu_fixed.source}",
        ),
        "overlap_ratio": Constant(
            _rounded(statistics.mean(hidden), 3),
            "1",
            "derived",
            _rounded(abs(hidden[0] - hidden[1]) / 2, 2),
            "1 - slowdown / copy time of memory-bound kernels beside 256 and 512 MiB copies;"
            f" compute-bound ones hide 92 to 98 %; {slowdowns[0].source}",
        ),
    }


def _h100() -> Constants:
    name = "h100"
    (peak,) = _quotes("engine.csv", name, "vram_bytes_per_s")
    (slope,) = _quotes("engine.csv", name, "kernel_efficiency_ratio")
    (link,) = _quotes("engine.csv", name, "pinned_h2d_bytes_per_s")
    (miss,) = _quotes("engine.csv", name, "copy_latency_s")
    (step,) = _quotes("engine.csv", name, "step_fixed_s")
    layer = _quotes("engine.csv", name, "layer_fixed_s")
    hidden = [quote.value for quote in _quotes("engine.csv", name, "overlap_ratio")]
    return _published(name) | {
        "vram_bytes_per_s": Constant(peak.value, "B/s", "measured", None, f"{OWN}; lm_head"),
        "kernel_efficiency_ratio": _derived(
            slope.value / peak.value,
            "1",
            f"3.05 TB/s, slope of time over bytes, over 3.07; ramps are in layer_fixed_s; {OWN}",
        ),
        "layer_fixed_s": _derived(
            sum(quote.value for quote in layer),
            "s",
            f"ramps and tails of seven kernels, 18 us, and the attention kernel, 3.9 us; {OWN}",
        ),
        "step_fixed_s": Constant(step.value, "s", "derived", None, f"{step.fields['note']}; {OWN}"),
        "copy_latency_s": _derived(
            miss.value - 17301504 / link.value,
            "s",
            f"0.339 ms that a missed expert of 17301504 bytes adds, less those at 54 GB/s; {OWN}",
        ),
        "pinned_h2d_bytes_per_s": Constant(link.value, "B/s", "measured", None, OWN),
        "overlap_ratio": Constant(
            _rounded(statistics.mean(hidden), 3),
            "1",
            "derived",
            _rounded((max(hidden) - min(hidden)) / 2, 2),
            f"57 to 76 % of background copies hidden behind the kernels of a step; {OWN}",
        ),
    }


def _assumed_from(base: Constants, name: str, known: Constants) -> Constants:
    source = f"assumed to be that of profile {name}"
    skipped = {"vram_bytes", "price_usd", *known}
    return {
        key: Constant(
            constant.value, constant.unit, "assumed", None, f"{source} ({constant.kind} there)"
        )
        for key, constant in base.items()
        if key not in skipped
    }


def _derived(value: float, unit: str, source: str, error: float | None = None) -> Constant:
    return Constant(_rounded(value), unit, "derived", error, source)


def _median(quotes: list[Quote], unit: str) -> Constant:
    by_rig = defaultdict(list)
    for quote in quotes:
        by_rig[quote.rig].append(quote.value)
    values = [statistics.median(rig) for rig in by_rig.values()]
    if len(values) == 1:
        values = [quote.value for quote in quotes]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    sources = "; ".join(dict.fromkeys(quote.source for quote in quotes))
    what = (
        f"median of {len(quotes)} values of {len(by_rig)} rig(s)"
        if len(quotes) > 1
        else "one value"
    )
    return Constant(
        _rounded(statistics.median(values)),
        unit,
        "measured",
        None if error is None else _rounded(error, 3),
        f"{what}; {sources}",
    )


def _overlapped_copy_s(fit: CsvFit, quote: Quote) -> float:
    num_mib = 512 if "512 MiB" in quote.fields["quantity"] else 256
    return fit.copy.predict_s(num_mib * 2.0**20)


def _quotes(file: str, profile: str, used_for: str) -> list[Quote]:
    column, scale = COLUMNS[file]
    return [
        Quote(
            float(fields[column]) * scale,
            fields.get("rig") or fields["source"] + fields["note"],
            fields["source"],
            fields,
        )
        for _, fields in _rows(file)
        if fields["profile"] == profile and fields["used_for"] == used_for
    ]


def _rows(file: str) -> list[tuple[int, dict[str, str]]]:
    return read_csv(MEASUREMENTS / file, ("profile", "source"))


def _rounded(value: float, digits: int = 6) -> float:
    # The last bits of a fit differ between machines; what is written must not.
    return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    main()
