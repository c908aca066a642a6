"""The compiled link: what plan.py can choose for a device that it knows becomes machine code that keeps its promises.

Needs no GPU: bench.offline compiles for the device and reads the cubin, PTX and TTGIR. Its table, committed under
bench/results/offline, has every plan; a sample of it is compiled anew here. So is a sample of the plans between the
sizes of the table, and kernels/limits.json is what follows from what was compiled.
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from bench import cells as of_cells
from bench import limits, sources
from bench import steps as of_steps
from bench.cells import CELLS, rows_of
from bench.offline import (
    ALL,
    BATCHES,
    COMPILE,
    DTYPES,
    GROUP,
    KERNELS,
    PRODUCTS,
    RESULTS,
    SCANS,
    TABULATED,
    TARGETS,
    TENSOR_MEMORY,
    fails,
    groups,
    key,
    read,
    source_of,
    table,
    why_failed,
)
from bench.sass import parse, time_loop, width
from fused_lstm import cells
from fused_lstm.cells.compiled import compiled
from fused_lstm.kernels import limits as of_kernels
from fused_lstm.kernels.limits import why_not
from fused_lstm.kernels.plan import choose_kernel
from fused_lstm.kernels.tiles import DEVICES, Problem, Tiles

ROOT = Path(__file__).parents[1]
TRITONS = ("3.6.0", "3.7.1", "3.9.0")
VARIANTS = {
    "dense": (),
    "packed reverse": ("--packed", "--reverse"),
    "lengths and resets": ("--lengths", "--reset"),
    "inference": ("--inference",),
    "float16": ("--dtype", "fp16"),
    "both directions": ("--directions", "2"),
    "layers": ("--layers", "2", "--drop"),
    "refused": ("--refused", "--dtype", "bf16", "tf32", "--H", "136", "--lengths", "--reset"),
    "refused layers": ("--refused", "--H", "136", "--layers", "2", "--drop"),
    "projection": ("--H", "2048", "4096", "--proj", "256", "--B", "16"),
}


def offline(*options):
    """The rows of bench.offline, from a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.offline", *map(str, options)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    failed = any(fails(row) for row in rows if "usage" not in row)
    assert rows and process.returncode == failed, process.stderr[-2000:]
    return rows


@cache
def plans():
    return groups()


def committed(version):
    """The rows of a Triton's file."""
    return read(RESULTS / f"triton-{version}.jsonl")


def faults(row):
    """The promises that a compiled kernel breaks, in words."""
    if "error" in row:
        return [row["error"]]
    if row["target"].startswith("gfx"):  # of whose assembly no time loop is read
        return [why_failed(row)] if fails(row) else [] if row["resources"]["matrix"] else ["no matrix instruction"]
    found, options, device = row["resources"], row["options"], TARGETS[row["target"]]
    forward, grid, step = row["kernel"] == "forward", row["mode"] == "grid", row["mode"] == "step"
    tiles, team, stack = row["tiles"], row["tiles"]["team"] > 1, row["stack"]
    polled, local = grid and tiles["poll"], row["mode"] == "local"
    flags = grid and not polled
    # Of 16 rows and 64 units parts in float32 pass in two turns.
    turns = 2 if tiles["batch"] * tiles["units"] >= 1024 and row["dtype"] in ("tf32", "fp32") else 1
    programs = row["layers"] * tiles["team"] * triton.cdiv(row["H"], tiles["team"] * tiles["units"])
    weights = tiles["kept"] or triton.cdiv(row["H"], tiles["chunk"]) * (1 if forward else 4 // tiles["team"])
    held = 0 if polled or local else weights * (1 + stack)  # in registers
    # A step's own: the input gates; in backward the gates, c, c_prev, dy and dhn. From the other programs: the flag, if
    # there is one, and h or dgates, as many tiles as W_hh has; in a team another flag and a product of each. With
    # offsets, one for each step that these belong to; with resets, one for the step, and one where others are waited
    # for. In a stack as much of the other layer; with dropout, seed and share. Not the weights'.
    own, offsets, resets = (4, 1, 1) if forward else (8, 2, 1)
    inner = flags * team  # exchanges within a step
    if tiles["part"]:  # c (dc) too, and all of them part by part; in forward a part has 32 bytes of units
        spans = tiles["units"] * (2 if row["dtype"] in ("bf16", "fp16") else 4) // 32 if forward else 1
        own = (own + 1) * (tiles["batch"] // tiles["part"]) * spans
    loads = own + grid * weights + flags + inner + team * tiles["team"]
    loads += stack * (flags + weights) + row.get("drop", False) * 2
    loads += row.get("packed", False) * (offsets + grid) + row.get("reset", False) * (resets + grid)
    if polled or local:
        # Of its own alone, because what is polled no tile loads: backward has c once, as long as the next step's
        # c_prev is this one's c, and dhn before the loop, as long as all rows end together. Where it polls, it loads
        # resets in two layouts, of the cell and of the addresses that wait.
        packed, in_reset, dropping = (row.get(name, False) for name in ("packed", "reset", "drop"))
        ragged = packed or row.get("lengths", False)
        loads = (4 if forward else 6 + (ragged or in_reset) + ragged) + packed + (1 + polled) * in_reset + 2 * dropping
    # With lengths and resets, the most that a kernel has, a team of few rows keeps some invariants in memory: a few
    # loads a step, where every other choice of tiles takes far longer.
    spills = 32 if polled and team and row.get("lengths", False) and row.get("reset", False) else 0
    broken = {
        f"{found['spills']} spills in the time loop": found["spills"] > spills,
        f"{found['shared']} bytes of shared memory, of {device.shared}": found["shared"] > device.shared,
        f"{found['tensor']} columns of tensor memory, of {TENSOR_MEMORY}": found["tensor"] > TENSOR_MEMORY,
        f"{found['loads']} tiles loaded a step, not {loads}": not (step or tiles["kept"]) and found["loads"] != loads,
        f"{found['resident']} tiles in shared memory, the weights have {held}": not step
        and (found["resident"] > 2 * local if polled or local else found["resident"] < held),  # the first product's
        f"{found['barriers']} barriers: a product's operands pass through shared memory": polled
        and found["barriers"] > 2 + 2 * row.get("drop", False) + 5 * row.get("bounded", False),
        f"{found['barriers']} barriers: more than parts and h (dgates) pass through shared memory": local
        and found["barriers"] > (2 + 4 * turns if row["class"] == "masked" else 18),
        f"{found['early']} looks for what others write before the own is written": polled and found["early"] > 0,
        "no matrix instruction": not found["matrix"] and not (step and tiles["poll"]),  # of one turn there is no loop
        "more programs than multiprocessors": grid and programs > device.multiprocessors,
        "not cooperative": grid and not options["cooperative"],
        f"{options['stages']} stages: h may be loaded before its flag": options["stages"] != 1,
        f"{found['read_only']} loads past the coherent caches": found["read_only"] > 0,
        f"{found['acquires']} acquires and {found['releases']} releases in order": found["acquires"]
        != flags * (1 + stack) + inner
        or found["releases"] != flags + inner,
    }
    return [fault for fault, is_broken in broken.items() if is_broken]


def losses(row, before):
    """What a compiled kernel takes more of than the row that was committed for it."""
    found, had = row["resources"], before["resources"]
    lost = [
        f"{had[name]} to {found[name]} {name}"
        for name in ("spills", "shared", "tensor", "registers", "barriers", "loaded", "stored")
        if found[name] > had[name]
    ]
    if found["instructions"] > 1.02 * had["instructions"]:
        lost.append(f"{had['instructions']} to {found['instructions']} instructions")
    cycles, before_cycles = (one.get("simulated", {}).get("cycles", 0) for one in (row, before))
    if cycles > 1.05 * before_cycles > 0:
        lost.append(f"{before_cycles} to {cycles} simulated cycles")
    # Another unit counts as worse: which one runs is a choice.
    if found["matrix"].keys() != had["matrix"].keys() or sum(found["matrix"].values()) > sum(had["matrix"].values()):
        lost.append(f"{had['matrix']} to {found['matrix']}")
    return lost


def check(rows, variant="dense"):
    """Fails on every broken promise; and, where the table has the row, on what it takes more of."""
    before = {key(row, COMPILE): row for row in committed(triton.__version__)} if variant == "dense" else {}
    failures = []
    for row in rows:
        found = faults(row)
        if "resources" in row and key(row, COMPILE) in before:
            found += losses(row, before[key(row, COMPILE)])
        failures += [f"{fault}: {row}" for fault in found]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def test_table_has_every_plan():
    chosen, failures = {key(row, GROUP) for row in plans()}, []
    for version in TRITONS:
        rows = committed(version)
        assert chosen == {key(row, GROUP) for row in rows}, f"make {version} anew: python -m bench.offline"
        assert len(rows) == len(chosen)
        failures += [f"{fault}: {row}" for row in rows for fault in faults(row)]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def test_table_is_made_from_its_files():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == table(RESULTS)


def test_limits_are_made_from_what_was_asked():
    assert limits.LIMITS.read_text(encoding="utf-8") == limits.text_of(limits.read_probed(RESULTS), source_of)


def above_what_passes(found):
    """The names of limits above the largest H that some Triton has passed below its least failure."""
    too_high = []
    for rows in limits.read_probed(RESULTS).values():
        too_high += [
            name for name, (most, _) in limits.limits_of([rows]).items() if found.get(name, (sys.maxsize,))[0] > most
        ]
    return too_high


def test_no_limit_is_above_what_passes():
    found = {name: tuple(limit) for name, limit in of_kernels.limits().items()}
    assert len(found) > 100 and not above_what_passes(found)
    name, (most, why) = next((name, limit) for name, limit in found.items() if limit[0] > 0)
    assert above_what_passes(found | {name: (most + 1, why)}) == [name]


def test_limits_follow_from_the_answers():
    """The least failure of each Triton counts, not what passes above it, and the lowest of all Tritons."""

    def row(name, H, why=""):
        return {"name": name, "H": H, "half": "", "why": why}

    one = [row("a", 100), row("a", 200, "spills"), row("a", 300), row("b", 50), row("c", 8, "spills")]
    another = [row("a", 100), row("a", 120), row("b", 40), row("b", 60, "no room")]
    assert limits.limits_of([one]) == {"a": (100, "spills"), "c": (0, "spills")}
    assert limits.limits_of([one, another]) == {"a": (100, "spills"), "b": (40, "no room"), "c": (0, "spills")}


@pytest.mark.parametrize("most", [0, 7, 300, 1000])
def test_a_limit_is_found_to_a_part_of_it(most):
    sizes, tried = list(range(8, 1025, 8)), []
    limits.bisect(sizes, lambda H: tried.append(H) or most < H)
    passing = max((H for H in tried if most >= H), default=0)
    failing = min((H for H in tried if most < H), default=sizes[-1])
    assert (failing - passing <= failing * limits.RESOLUTION or passing == 0) and len(tried) < 10


def of(source):
    """One source for everything."""
    return lambda limit: source


def test_exploring_lowers_limits_until_all_that_is_planned_passes(tmp_path, monkeypatch):
    """On kernels that are not compiled: the larger of two spills from H 300 on, and a run that is cut short goes on."""
    monkeypatch.setattr(limits, "LIMITS", tmp_path / "limits.json")
    common = {"target": "sm_90", "dtype": "bf16", "kernel": "forward", "mode": "grid", "stack": False, "proj": 0}
    common["weights"] = ""
    tiles = [asdict(Tiles(batch, 16, 64, 4)) for batch in (32, 16)]
    name = limits.name_of(common | {"H": 40, "tiles": tiles[0]})
    compiled = []

    def choose():
        rows = [common | {"half": "", "class": "masked", "tiles": each} for each in tiles]
        sizes = list(range(40, 1025, 64))
        most, _ = of_kernels.limits().get(name, (1024, ""))
        parts = [H for H in sizes if most >= H], [H for H in sizes if most < H]
        return [row | {"H": max(part), "sizes": part} for row, part in zip(rows, parts, strict=True) if part]

    def why(group):
        compiled.append((group["tiles"]["batch"], group["H"]))
        if len(compiled) == 3:
            raise KeyboardInterrupt
        return "registers spill" if group["tiles"]["batch"] == 32 and group["H"] > 300 else ""

    before = dict(of_kernels.limits())
    try:
        with pytest.raises(KeyboardInterrupt):
            limits.explore(choose, limits.Asked(tmp_path, "3.0.0", of("a"), why))
        limits.explore(choose, limits.Asked(tmp_path, "3.0.0", of("a"), why))
        found = json.loads((tmp_path / "limits.json").read_text())
        assert found == {"checked": {"3.0": ["sm_90"]}, "limits": {name: [296, "registers spill"]}}
        assert len(compiled) == len(set(compiled)) + 1  # the one that was cut short
        # Of some sizes nothing follows for the others.
        limits.explore(choose, limits.Asked(tmp_path, "3.1.0", of("a"), lambda group: ""), whole=False)
        assert json.loads((tmp_path / "limits.json").read_text())["checked"] == {"3.0": ["sm_90"], "3.1": []}
        # Of another source what passes is asked anew, and a limit stands.
        limits.write(tmp_path, of("b"))
        assert json.loads((tmp_path / "limits.json").read_text()) == found | {"checked": {"3.0": [], "3.1": []}}
        compiled.clear()
        asked = limits.Asked(tmp_path, "3.0.0", of("b"), lambda group: compiled.append(group["H"]) or "")
        limits.explore(choose, asked)
        assert json.loads((tmp_path / "limits.json").read_text()) == found | {"checked": {"3.0": ["sm_90"], "3.1": []}}
        asked = [row["H"] for row in limits.read_probed(tmp_path)["3.0.0"] if row["source"] == "b" and row["H"]]
        assert asked == compiled and {group["H"] for group in choose()} <= {*asked}
    finally:
        limits.install(before)


def test_time_loop_has_what_was_moved_out_of_it():
    lines = """
        /*0000*/ LDG.E R0, desc[UR4][R2.64] ;
    .L_x_0:
        /*0010*/ @!P0 BRA `(.L_x_2) ;
    .L_x_1:
        /*0020*/ @P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/ BRA.U UP0, `(.L_x_0) ;
        /*0040*/ STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0050*/ EXIT ;
    .L_x_2:
        /*0060*/ HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0070*/ BRA `(.L_x_1) ;
    """
    bits = "/* 0x0000000000000000 */"
    code = parse(lines.replace(";", f"; {bits}\n{bits}"))
    loop = time_loop(code)
    opcodes = [code[place].opcode for place in loop.members]
    assert opcodes == ["BRA", "LDG.E.128.CONSTANT", "BRA.U", "HMMA.16816.F32", "BRA"]
    assert (code[loop.head].predicate, code[loop.jump].opcode) == ("!P0", "BRA.U")
    assert [width(access) for access in ("LDG.E", "LDG.E.U8", "STG.E.U16", "LDG.E.64", opcodes[1])] == [4, 1, 2, 8, 16]


def sample():
    """Places in plans() of one kernel for each target, pass and form, the least H; dtype and alignment take turns."""
    every = plans()
    forms = [("local", False), ("grid", False), ("step", False), ("grid", True)]
    places = []
    for turn, (of_target, kernel, (mode, stack)) in enumerate(product(TABULATED, KERNELS, forms)):
        # Each target, pass and form meets another dtype; of stacks those that every device has.
        dtype = PRODUCTS[(turn + turn // 4) % (2 if stack else 3)]
        kind = {"target": of_target, "dtype": dtype, "kernel": kernel, "mode": mode, "stack": stack}
        fitting = [place for place, group in enumerate(every) if kind.items() <= group.items()]
        wide = ("power", "whole", "masked") if turn % 5 < 3 else ("even", "odd")
        taken = [place for place in fitting if every[place]["class"] in wide] or fitting
        places += [min(taken, key=lambda place: every[place]["H"])] if taken else []
    return places


def test_sample_of_plans():
    check(offline("--groups", *sample(), "--simulate"))


def test_devices_without_a_table():
    rows = offline("--H", 136, "--device", "RTX 4090", "RTX 5090", "MI300X", "RX 7900 XTX")
    assert {row["target"] for row in rows} == {"sm_86", "sm_120", "gfx942", "gfx1100"}
    check(rows)


def test_weights_of_8_bits():
    rows = offline("--H", 1536, 2048, "--dtype", "bf16", "fp16", "--B", 1, "--weights", "fp8")
    assert len(rows) == 4 and all(row["kernel"] == "forward" and row["tiles"]["units"] == 16 for row in rows)
    check(rows)
    check(offline("--H", 2048, "--B", 1, "--weights", "int8", "--lengths", "--reset", "--directions", 2), "both")


@cache
def known_good(version):
    """By the name of a limit the largest H that a Triton has compiled below its least failure."""
    rows, most = limits.read_probed(RESULTS)[version], {}
    found = limits.limits_of([rows])
    for row in rows:
        if row["source"] == source_of(row["name"]) and row["H"] <= found.get(row["name"], (sys.maxsize,))[0]:
            most[row["name"]] = max(most.get(row["name"], 0), row["H"])
    return most


@pytest.mark.parametrize("device", ALL)
def test_plans_between_the_sizes_of_the_table(device):
    """A sample of them passes why_not(), and is no longer than what has been compiled."""
    draw, unknown, of_target = random.Random(device), [], of_kernels.target(ALL[device])
    checked = of_kernels.shipped()["checked"]
    assert all(of_target in checked[of_kernels.minor(version)] for version in TRITONS), (
        f"ask each of them: python -m bench.offline --explore --target {of_target}"
    )
    for _ in range(60):
        dtype, layers = draw.choice(PRODUCTS), draw.choice((1, 1, 2))
        H, B = int(2 ** draw.uniform(0, 11)), draw.choice(BATCHES)
        torch_dtype, ieee = DTYPES[dtype]
        plan = choose_kernel(torch_dtype, B, H, ALL[device], ieee, 1, layers)
        for backward in () if layers > 1 and plan.mode != "grid" else (False, True):
            problem, tiles = Problem(dtype, H, backward, 1, layers), plan.backward if backward else plan.forward
            assert not why_not(tiles, plan.mode, problem, ALL[device])
            name = of_kernels.limit_name(tiles, plan.mode, problem, of_target)
            # Outside the grid form sizes with masks stand for those without, and narrow ones for each other.
            least = H if plan.mode == "grid" else 1
            unknown += [(version, name, H, B) for version in TRITONS if known_good(version).get(name, 0) < least]
    assert not unknown


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dense"])
def test_variants(variant):
    check(offline("--H", 20, 136, "--B", 64, 256, *VARIANTS[variant]), variant)


def test_bounded_waits(monkeypatch):
    monkeypatch.setenv("FUSED_LSTM_DEBUG", "1")
    rows = offline("--H", 130, 136, "--B", 64, 256)
    assert {row["tiles"]["poll"] for row in rows} == {False, True}
    check([row | {"bounded": True} for row in rows], "bounded")


def test_kernels_beside_the_recurrence():
    """The scan of recompute and dropout."""
    cases = (
        "A100:bf16:512",
        "A100:fp32:650",
        "H100:bf16:650",
        "H100:fp32:512",
        "MI300X:fp32:650",
        "RX 7900 XTX:bf16:512",
    )
    rows = offline("--beside", *cases)
    assert len(rows) == len(cases) * (len(SCANS) + 1)
    for row in rows:
        used = row["usage"]
        assert used["stack"] == 0 < used["registers"], row
        assert used["shared"] <= ALL[row["device"]].shared, row


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("of_target", TABULATED)
def test_all_plans(of_target, variant):
    places = [place for place, group in enumerate(plans()) if group["target"] == of_target]
    check(offline("--groups", *places, *VARIANTS[variant]), variant)


def printed(code, count):
    """The rows that a program prints, which compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(rows) == count, process.stderr[-2000:]
    return rows


OF_CELLS = """
import json
from dataclasses import asdict

from bench import cells
from bench.offline import resources

for row in cells.rows_of("gru"):
    if (row["device"], row["dtype"], row["B"]) != ("H100", "bf16", 16) or row["H"] not in (130, 512):
        continue
    for flags in ({}, {"resets": True, "lengths": True}, {"save": False}):
        if row["kernel"] == "forward" or "save" not in flags:
            print(json.dumps(row | {"flags": flags, "resources": asdict(resources(cells.compile_row(row, **flags)))}))
"""


def waits_as_it_should(row, found):
    """Whether a kernel of any cell has its flags, or polls: then what a warp multiplies passes no shared memory, and
    nothing is looked for before the own is written."""
    polled = row["tiles"]["poll"]
    flags = row["mode"] == "grid" and not polled
    waits = found["acquires"] == found["releases"] == flags and found["read_only"] == 0
    return waits and not (polled and (found["early"] > 0 or found["barriers"] > 2))


@pytest.mark.parametrize("version", TRITONS)
def test_the_kernels_of_any_cell_are_tabulated_and_keep_their_registers(version):
    rows = {of_cells.key(row): row for row in read(RESULTS / f"cells-{version}.jsonl")}
    wanted = [row | {"equations": compiled(getattr(cells, cell)).name} for cell in CELLS for row in rows_of(cell)]
    assert [of_cells.key(row) for row in wanted] == list(dict.fromkeys(of_cells.key(row) for row in wanted))
    assert {of_cells.key(row) for row in wanted} == set(rows)
    for row in wanted:
        found = rows[of_cells.key(row)]
        assert (found["source"], found["equations"]) == (of_cells.source(), row["equations"]), of_cells.key(row)
        taken = found["resources"]
        assert taken["spills"] == 0 and taken["shared"] <= DEVICES[row["device"]].shared and taken["matrix"]
        assert waits_as_it_should(row, taken), of_cells.key(row)


def test_a_kernel_of_any_cell_compiled_anew_is_no_worse():
    rows = printed(OF_CELLS, 10)
    known = {of_cells.key(row): row["resources"] for row in read(RESULTS / f"cells-{triton.__version__}.jsonl")}
    for row in rows:
        found = row["resources"]
        # With lengths and resets, the most that a kernel has, a few loads a step: a device then takes the next tiles.
        assert found["spills"] <= (8 if "resets" in row["flags"] else 0)
        assert waits_as_it_should(row, found), row
        if not row["flags"]:
            assert found == known[of_cells.key(row)]


OF_STEPS = """
import json

from bench import steps

for row in steps.rows_of():
    case = row["device"], row["dtype"], row["H"], row["B"], row["weights"]
    if case in [("H100", "bf16", 160, 1, "int8"), ("H100", "fp32", 512, 1, "")]:
        print(json.dumps(steps.answered(row)))
"""


@pytest.mark.parametrize("version", TRITONS)
def test_the_kernel_of_one_step_is_tabulated_and_keeps_its_registers(version):
    rows = {of_steps.key(row): row for row in read(RESULTS / f"steps-{version}.jsonl")}
    wanted = [of_steps.key(row) for row in of_steps.rows_of()]
    assert set(rows) == set(wanted) and len(set(wanted)) == len(wanted)
    for name, row in rows.items():
        assert row["source"] == of_steps.source(), name
        assert row["tiles"] == of_steps.tiles_of(row), name
        assert row["usage"]["stack"] == 0 and row["usage"]["shared"] <= ALL[row["device"]].shared, name


def test_what_one_step_is_simulated_to_take():
    """Of B 1 in 16 bit what README.md aims at, in microseconds a layer."""
    for version in TRITONS:
        for row in read(RESULTS / f"steps-{version}.jsonl"):
            if "simulated" in row and (row["dtype"], row["B"], row["D"]) == ("bf16", 1, 1):
                assert row["simulated"]["all"] / 1830 / row["L"] <= (2 if row["H"] <= 512 else 3.1), of_steps.key(row)


def test_a_kernel_of_one_step_compiled_anew_is_no_worse():
    rows = printed(OF_STEPS, 2)
    known = {of_steps.key(row): row for row in read(RESULTS / f"steps-{triton.__version__}.jsonl")}
    for row in rows:
        assert row | {"source": of_steps.source()} == known[of_steps.key(row)]


def test_a_source_is_what_a_kernel_reaches(monkeypatch, tmp_path):
    found = {}
    sources.reached(("latency_forward", "latency_forward_kernel"), found)
    assert {("polling", "words"), ("operands", "multiply"), ("sync", "record_timeout")} < set(found)
    assert ("matmul", "recurrent_matmul") not in found and ("launch", "launch") not in found
    step = "@jit\ndef step():\n    pass\n"
    kernel = "@jit\ndef kernel():\n    step()\n"
    files = {"forward": f"{kernel}\n{step}", "other": "", "launch": "def specialization():\n    pass\n"}

    def hash_with(**changed):
        for name, text in (files | changed).items():
            (tmp_path / f"{name}.py").write_text(text)
        sources.names_of.cache_clear()
        code = SimpleNamespace(co_filename="forward.py")
        return sources.hash_of(SimpleNamespace(fn=SimpleNamespace(__name__="kernel", __code__=code)))

    monkeypatch.setattr(sources, "KERNELS", tmp_path)
    before, moved = hash_with(), f"from .other import step\n\n{kernel}"
    try:
        for same in (
            {"forward": files["forward"] + "\n@jit\ndef beside():\n    pass\n"},
            {"forward": files["forward"].replace("pass", '"""Says what."""\n    # why\n    pass')},
            {"forward": moved, "other": step},
        ):
            assert hash_with(**same) == before, same
        for other in (
            {"forward": files["forward"].replace("pass", "return 1")},
            {"forward": moved, "other": step.replace("pass", "return 1")},
            {"launch": files["launch"].replace("pass", "return 1")},
        ):
            assert hash_with(**other) != before, other
    finally:
        sources.names_of.cache_clear()
