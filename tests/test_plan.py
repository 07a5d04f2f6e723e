"""Machines, simulated schedules, the choice among them, memory, and the command."""

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.cli.plan import main
from lvxattn.common.handshake import SCHEDULES
from lvxattn.draw import picture
from lvxattn.draw.bars import format_bytes
from lvxattn.plan import simulate
from lvxattn.plan.choose import Layout, candidates, explain, unlike_ranks
from lvxattn.plan.machine import MACHINES, Link, Machine, Measured
from lvxattn.plan.memory import memory, most_frames
from lvxattn.plan.models import MODELS, PROBLEMS, Model, planned
from lvxattn.plan.simulate import play
from lvxattn.plan.steps import messages
from lvxattn.plan.whole import WHOLE, Stack, Whole, most_frames_of_step, step, step_memory
from tests.errors import says

# Arithmetic is free unless a test says otherwise, and so is reading.
FREE = Machine("free", 1e30, 1e30, 0.0, 1e9, Link(1e3, 0.0), Link(1e3, 0.0), 64, 64, 1e30, 0.0)
MEASURED = Measured("mpi_impl", "CPU, 2 cores", 32, 8, 128, "float32")
ON = asdict(MEASURED)


def layout(P: int, schedule: str = "lv-xattn", **sizes: Any) -> Layout:
    of = {"S_Q": 8, "S_KV": 16, "H": 4, "H_KV": 4, "D": 2, **sizes}
    lengths = ((of["S_Q"] // P,) * P, (of["S_KV"] // P,) * P)
    return Layout(
        0, tuple(range(P)), *lengths, (None,) * P, (False,) * P, 1, of["H"], of["H_KV"], of["D"],
        of["D"], "float32", 1.0, schedule, of.get("queries", "sharded"),
        grid=(P // 2, 2) if schedule == "grid" else None,
    )  # fmt: skip


def nbytes(of: Layout, backward: bool = False) -> int:
    return sum(message.nbytes for message in messages(of, 0, backward=backward))


class TestClock:
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_time_without_arithmetic_is_that_of_the_bytes(
        self, schedule: str, backward: bool
    ) -> None:
        of = layout(4, schedule)
        played = play(of, FREE, backward=backward)
        assert played.seconds == pytest.approx(nbytes(of, backward) / 1e3)
        assert played.computing < 1e-9

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_time_without_network_is_that_of_the_arithmetic(self, schedule: str) -> None:
        fast = replace(FREE, matmul=1e3, inside=Link(1e30, 0.0))
        for backward, products in ((False, 4), (True, 10)):  # of D = D_V = 2 numbers each
            played = play(layout(4, schedule), fast, backward=backward)
            assert played.seconds == pytest.approx(2 * 4 * 8 * 16 * products / 4 / 1e3)
            assert played.waiting == pytest.approx(0, abs=1e-9)

    def test_ring_overlaps_messages_with_arithmetic(self) -> None:
        of = layout(4, "ring")
        hop = nbytes(of) / 3 / 1e3
        for share in (0.5, 1.0, 2.0):  # of a hop's time on the wire
            pairs = 2 * 4 * 2 * 4 * 4
            machine = replace(FREE, matmul=pairs / (share * hop))
            assert play(of, machine).seconds == pytest.approx(
                4 * share * hop if share >= 1 else 3 * hop + share * hop
            )

    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
    def test_grid_overlaps_all_messages_with_arithmetic(
        self, shape: tuple[int, int], backward: bool
    ) -> None:
        of = replace(layout(8, "grid", S_Q=32, S_KV=32), grid=shape)
        wire = nbytes(of, backward) / 1e3
        alone = play(of, replace(FREE, matmul=1e6, inside=Link(1e30, 0.0)), backward=backward)
        # Arithmetic that takes four times as long as all messages hides every one of them.
        machine = replace(FREE, matmul=1e6 * alone.seconds / (4 * wire))
        assert play(of, machine, backward=backward).waiting == pytest.approx(0, abs=1e-6 * wire)

    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("ranks_per_host", [1, 2, 4, 8])
    def test_one_host_stands_for_all_where_they_are_alike(
        self, schedule: str, backward: bool, ranks_per_host: int
    ) -> None:
        two = replace(
            FREE, ranks_per_host=ranks_per_host, matmul=1e4, copy=1e4, inside=Link(3e3, 0.1)
        )
        even = layout(8, schedule, S_Q=32, S_KV=64, H=8, H_KV=8)
        for order in ((0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)):
            for shape in ((4, 2), (2, 4)) if schedule == "grid" else (None,):
                of = replace(even, order=order, grid=shape)
                found = simulate._play(of, two, backward, ranks_per_host)
                whole = simulate._play(of, two, backward, 8)
                assert found.seconds == pytest.approx(whole.seconds)
                assert found.computing == pytest.approx(whole.computing)
                assert simulate._unlike(of, two) == ranks_per_host
                uneven = replace(of, s_q=(3, 5, *of.s_q[2:]))
                assert simulate._unlike(uneven, two) == 8

    @pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "ulysses"])
    def test_many_ranks_are_alike_in_spite_of_one_row(
        self, schedule: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts: list[int] = []
        simulated = simulate._play

        def counting(of: Layout, machine: Machine, backward: bool, count: int) -> Any:
            counts.append(count)
            return simulated(of, machine, backward, count)

        monkeypatch.setattr(simulate, "_play", counting)
        machine, shapes = MACHINES["a100-16"], ((1, 32, 1010, 128), (1, 8, 100_010, 128))
        of = planned(*shapes, 40, schedule=schedule, grid=(10, 4) if schedule == "grid" else None)
        exact = simulated(of, machine, False, 40).seconds
        assert play(of, machine).seconds == pytest.approx(exact, rel=1 / 25)  # 25 or 26 queries
        assert counts == [machine.ranks_per_host]
        # Where a row more is a rank's whole share, or ranks are few, each is simulated.
        for queries, P in ((20, 40), (1010, 32)):
            play(planned((1, 32, queries, 128), shapes[1], P, schedule="ring"), machine)
            assert counts[-1] == P

    def test_grid_of_many_ranks_is_one_of_those_that_send_least(self) -> None:
        machine, shapes = MACHINES["a100-16"], ((1, 32, 4096, 128), (1, 8, 65536, 128))
        found = planned(*shapes, 64, schedule="grid", machine=machine)
        every = [planned(*shapes, 64, schedule="grid", grid=(2**n, 64 // 2**n)) for n in range(7)]
        sent = sorted((nbytes(of) + nbytes(of, backward=True), of.grid) for of in every)
        assert found.grid in [grid for _, grid in sent[:4]]
        seconds = {
            grid: sum(
                play(planned(*shapes, 64, schedule="grid", grid=grid, machine=machine), machine,
                     backward=b).seconds
                for b in (False, True)
            )
            for _, grid in sent[:4]
        }  # fmt: skip
        assert found.grid == min(seconds, key=seconds.__getitem__)

    def test_latency_per_hop_and_per_collective(self) -> None:
        machine = replace(FREE, inside=Link(1e30, 1.0))
        assert play(layout(4, "ring"), machine).seconds == pytest.approx(3.0)
        assert play(layout(4, "gather"), machine).seconds == pytest.approx(2.0)

    def test_ranks_of_a_host_share_its_link(self) -> None:
        two = replace(FREE, ranks_per_host=2, inside=Link(1e30, 0.0))
        ring, gather = layout(4, "lv-xattn"), layout(4, "gather")
        assert play(ring, two).seconds == pytest.approx(nbytes(ring) / 1e3)
        # Two ranks send two thirds of their bytes to the other host, over one link.
        assert play(gather, two).seconds == pytest.approx(2 * 2 / 3 * nbytes(gather) / 1e3)

    def test_ring_crosses_each_host_once(self) -> None:
        two = replace(FREE, ranks_per_host=2, inside=Link(1e30, 0.0))
        dealt = replace(layout(4), order=(0, 2, 1, 3))  # ranks 0 and 2 are on one host
        assert play(dealt, two).seconds == pytest.approx(nbytes(dealt) / 1e3)

    def test_hiding_of_arithmetic_and_reading(self) -> None:
        of = layout(1)
        arithmetic, reading = 4 * 2 * 4 * 8 * 16, 16 * 4 * 4 * 4
        for hiding in (0.0, 0.5, 1.0):
            machine = replace(FREE, matmul=1e3, memory=1e3, hiding=hiding)
            hidden = hiding * min(arithmetic, reading)
            assert play(of, machine).seconds == pytest.approx((arithmetic + reading - hidden) / 1e3)

    def test_only_new_blocks_are_copied(self) -> None:
        query, result = 4 * 2 * 2 * 4, 4 * 2 * 4 * 4
        keys = 2 * 4 * 4 * 2 * 4
        copied = {
            "lv-xattn": query + 3 * result + 3 * result,  # sent, and merged
            "ring": keys + 4 * result,  # merged: its own two parts, and three visitors
            "gather": 3 * query + 4 * query + 3 * result + 3 * result,  # sent, laid side by side
            "ulysses": (3 + 4) * (query + keys) / 4 + (3 + 4) * result / 4,
        }
        self.assert_copied(copied, backward=False)

    def test_memory_for_gradients_of_all_keys(self) -> None:
        mine = 4 * 4 * (2 + 2) * 4  # a quarter of 16 keys, 4 heads, D = D_V = 2, fp32
        block, result = 4 * 2 * (2 + 2 + 1 + 1) * 4, 4 * 2 * 2 * 4
        made = {
            "lv-xattn": mine + block + 3 * result + 3 * result,
            "ring": 4 * mine + mine + 3 * mine + 3 * mine,  # a hop's, too; sent, and added
            "gather": mine + 3 * block + 4 * block + 3 * result + 3 * result,
            "ulysses": mine + (3 + 4) * (block + mine) / 4 + (3 + 4) * (result + mine) / 4,
        }
        self.assert_copied(made, backward=True)

    def test_memory_that_is_new_to_the_process(self) -> None:
        query, result, keys = 4 * 2 * 2 * 4, 4 * 2 * 4 * 4, 2 * 4 * 4 * 2 * 4
        # Not messages, nor what is merged or added: those have buffers.
        joined = {"lv-xattn": 0, "ring": 0, "gather": 4 * query, "ulysses": query + keys + result}
        self.assert_copied(joined, backward=False, copy=1e30, copy_new=1e3)
        zeros = {"lv-xattn": keys, "ring": 4 * keys}
        self.assert_copied(zeros, backward=True, copy=1e30, copy_new=1e3)

    def assert_copied(self, nbytes: dict[str, float], backward: bool, **rates: float) -> None:
        slow = replace(FREE, inside=Link(1e30, 0.0), **(rates or {"copy": 1e3}))
        for schedule, copied in nbytes.items():
            played = play(layout(4, schedule), slow, backward=backward)
            assert played.seconds == pytest.approx(copied / 1e3), schedule

    def test_every_message_costs_its_ranks(self) -> None:
        slow = replace(FREE, message=1.0, message_at_once=0.5, inside=Link(1e30, 0.0))
        # Each of 3 hops, or other ranks: a block and a result, sent and received.
        assert play(layout(4), slow).seconds == pytest.approx(12.0)
        assert play(layout(4, "gather"), slow).seconds == pytest.approx(6.0)

    @pytest.mark.parametrize(("busy", "seconds"), [(0.0, 5.0), (0.5, 6.5), (1.0, 8.0)])
    def test_busy_receiver_does_not_compute(self, busy: float, seconds: float) -> None:
        # The other rank's keys take 3 s to come, those that are here 5 s to be read.
        of = layout(2, "ring")
        rows = of.s_kv[0] * of.B * of.H_KV * (of.D + of.D_V) * 4
        slow = replace(FREE, memory=rows / 5.0, inside=Link(rows / 3.0, 0.0, busy))
        both = play(of, slow).seconds
        assert both - 5.0 == pytest.approx(seconds)  # then those that have come

    def test_backward_has_rates_of_its_own(self) -> None:
        slow = replace(FREE, matmul=1.0, memory=1.0)
        fast = replace(slow, matmul_backward=2.0, memory_backward=2.0)
        for backward in (False, True):
            before, after = (play(layout(1), m, backward=backward).seconds for m in (slow, fast))
            assert before == pytest.approx(after * (1 + backward))

    def test_block_without_queries_takes_no_time(self) -> None:
        slow = replace(FREE, memory=1e3, start=5.0)
        empty = replace(layout(1), s_q=(0,))
        assert play(empty, slow).seconds == pytest.approx(0)

    def test_call_overhead_counts_once(self) -> None:
        for schedule in SCHEDULES:
            machine = replace(FREE, call=5.0, inside=Link(1e30, 0.0))
            assert play(layout(4, schedule), machine).seconds == pytest.approx(5.0)

    def test_block_time_is_at_least_start_and_reading(self) -> None:
        of = layout(1)
        slow = replace(FREE, memory=1e3)
        assert play(of, slow).seconds == pytest.approx(16 * 4 * 4 * 4 / 1e3)
        assert play(of, replace(FREE, start=5.0)).seconds == pytest.approx(5.0)


class TestChoice:
    def test_auto_without_machine_minimises_bytes(self) -> None:
        assert candidates(layout(4, S_Q=4, S_KV=400))[0].schedule == "lv-xattn"
        assert candidates(layout(4, S_Q=400, S_KV=4))[0].schedule == "ring"
        assert candidates(layout(4, S_Q=64, S_KV=64))[0].schedule == "ulysses"

    def test_auto_with_machine_minimises_time(self) -> None:
        far = replace(FREE, inside=Link(1e9, 1.0))  # latency is all that counts
        found = candidates(layout(8, S_Q=8, S_KV=800, H=4), far)
        assert found[0].schedule == "gather"
        assert [c.seconds for c in found if c.seconds] == sorted(
            c.seconds for c in found if c.seconds
        )

    def test_unusable_schedule_is_last_with_reason(self) -> None:
        of = layout(8, H_KV=4, S_Q=64, S_KV=64)
        assert candidates(of)[-1].schedule == "ulysses"
        assert "P = 8 does not divide H_KV = 4" in explain(of)
        ruled = replace(layout(4, S_Q=400, S_KV=4), rules=(True, False, False, False))
        assert candidates(ruled)[0].schedule in ("lv-xattn", "gather")
        assert {c.schedule for c in candidates(ruled) if c.refused} == {"ring", "grid", "ulysses"}

    @pytest.mark.parametrize(
        ("machine", "best"), [(None, "ring"), (MACHINES["a30-8"], "gather")], ids=["bytes", "time"]
    )
    def test_auto_agrees_on_all_ranks_and_explains(
        self, machine: Machine | None, best: str
    ) -> None:
        q, k = np.zeros((1, 2, 40, 4)), np.zeros((1, 2, 2, 4))
        layouts = reference.run_ranks(
            3,  # only rank 0's machine counts
            lambda comm: Layout.agree(
                q, k, k, comm, schedule="auto", machine=machine if comm.rank == 0 else None
            ),
        )
        assert {of.schedule for of in layouts} == {best}
        text = explain(layouts[2])
        assert text.startswith(f"{best} is taken\n")
        assert text.splitlines()[2].split()[0] == best
        assert ("0.00" in text) == (machine is not None)

    @pytest.mark.parametrize("side", ["queries", "keys"])
    def test_replicated_sides_have_no_schedule(self, side: str) -> None:
        q, k = np.zeros((1, 2, 40, 4)), np.zeros((1, 2, 2, 4))
        option: Any = {side: "replicated"}
        for of in reference.run_ranks(
            3, lambda comm: Layout.agree(q, k, k, comm, schedule="auto", **option)
        ):
            assert of.schedule == "lv-xattn"
            assert of.way == {"queries": "replicated", "keys": "replicated keys"}[side]
            assert explain(of) == f"{side} are replicated: no schedule moves them"

    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize(
        ("s_q", "s_kv"),
        # Round the ring: of ranks with equal shares, that before a small one sends more.
        [((3, 9, 3, 3), (5, 5, 5, 5)), ((3, 3, 3, 3), (5, 9, 5, 5)), ((0, 9, 3, 1), (5, 0, 2, 7))],
    )
    def test_busiest_rank_counts(
        self, schedule: str, s_q: tuple[int, ...], s_kv: tuple[int, ...]
    ) -> None:
        order = (2, 0, 3, 1)
        q, k = (tuple(n[order.index(rank)] for rank in range(4)) for n in (s_q, s_kv))
        masks = tuple(((1, 1, 1, n), "bool") for n in k)
        uneven = replace(layout(4, schedule), order=order, s_q=q, s_kv=k, masks=masks)
        (found,) = [c for c in candidates(uneven) if c.schedule == schedule]
        uneven = replace(uneven, grid=found.grid)
        both = [messages(uneven, rank) + messages(uneven, rank, backward=True) for rank in order]
        assert found.nbytes == max(sum(message.nbytes for message in sent) for sent in both)
        assert {found.messages} == set(map(len, both))

    def test_at_most_four_similar_ranks_are_simulated(self) -> None:
        even, uneven = (planned((1, 4, n, 2), (1, 4, 640, 2), 64) for n in (640, 650))
        assert len(unlike_ranks(even)) == 1
        assert 2 <= len(unlike_ranks(uneven)) <= 4

    def test_auto_equals_chosen_schedule(self) -> None:
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, 2, s, 4)) for s in (6, 30, 30))
        want, _ = reference.full_attention(q, k, v)

        def on_a_rank(comm: reference.VirtualComm) -> Any:
            parts = (reference.shard(x, comm) for x in (q, k, v))
            return reference.cross_attention(*parts, comm, schedule="auto")[0]

        found = np.concatenate(reference.run_ranks(3, on_a_rank), axis=2)
        np.testing.assert_allclose(found, want, rtol=1e-12)


class TestMachine:
    def test_machine_file_round_trip(self, tmp_path: Path) -> None:
        for machine in (*MACHINES.values(), replace(FREE, measured=MEASURED)):
            machine.check()
            machine.save(tmp_path / "m.json")
            assert Machine.load(tmp_path / "m.json") == machine

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"version": 2}, "machine: expected version 4 in .*, got 2: measure it again"),
            ({"version": True}, says("machine", "version 4", True)),
            ({"matmul": 0}, "machine: expected a number above 0 for matmul in .*, got 0"),
            ({"start": -1}, "machine: expected a number from 0 up for start in .*, got -1"),
            (
                {"inside": {"bandwidth": "x", "latency": 0}},
                says("machine", "inside.bandwidth", "'x'"),
            ),
            ({"copy": 0}, says("machine", "copy", 0)),
            ({"call": -1}, says("machine", "call", -1)),
            ({"hiding": 1.5}, "machine: expected a number from 0 to 1 for hiding in .*, got 1.5"),
            ({"hiding": "x"}, says("machine", "hiding", "'x'")),
            ({"room": 10**400}, "^machine: .* room .*1000"),
            ({"ranks": 2.5}, "machine: expected an int for ranks in .*, got 2.5"),
            ({"name": ["a"]}, r"machine: expected a text for name in .*, got \['a'\]"),
            (
                {"measured": ON | {"dtype": "int8"}},
                "one of .* for measured.dtype in .*, got 'int8'",
            ),
            ({"measured": ON | {"H": 0}}, "an int above 0 for measured.H in .*, got 0"),
            ({"measured": ON | {"device": 1}}, "a text for measured.device in .*, got 1"),
            ({"measured": {"by": "me"}}, "machine: .* is damaged"),
            ({"inside": 3}, "machine: .* is damaged"),
            ({"colour": "red"}, "machine: .* is damaged"),
        ],
    )
    def test_damaged_machine_file_raises(
        self, tmp_path: Path, change: dict[str, Any], text: str
    ) -> None:
        path = tmp_path / "m.json"
        MACHINES["h100"].save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=text):
            Machine.load(path)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ('{"version": 4, "name": "h1', "is not JSON: "),
            ("[" * 100_000, "is not JSON: "),
            ("{}", "has no version"),
            ("[3]", "has no version"),
        ],
    )
    def test_other_file_raises(self, tmp_path: Path, content: str, words: str) -> None:
        path = tmp_path / "m.json"
        path.write_text(content)
        expected = (
            "machine: expected a file that measure or Machine.save wrote, got .*m.json, which "
        )
        with pytest.raises(ValueError, match=expected + words):
            Machine.load(path)

    def test_bad_machine_raises_on_all_ranks(self) -> None:
        x = np.zeros((1, 1, 2, 2))
        with pytest.raises(TypeError, match="machine: expected a Machine or None, got str"):
            reference.run_ranks(
                2, lambda comm: Layout.agree(x, x, x, comm, schedule="auto", machine="h100")
            )


class TestMemory:
    def test_paper_example_needs_234_gib(self) -> None:
        found = memory(MODELS["llama3v"], 2048, 1200, 1, dtype="bfloat16", recompute=False)
        assert found.keys == 2 * 8 * 1200 * 6404 * 8 * 128 * 2
        assert round(found.keys / 2**30) == 235  # "over 234 GB"

    def test_recomputed_keys_take_memory_of_one_layer(self) -> None:
        model = MODELS["mplug-owl3-7b"]
        kept, again = (
            memory(model, 512, 100, 8, dtype="float16", recompute=x) for x in (False, True)
        )
        assert kept.keys == model.cross_layers * again.keys
        assert (kept.features, kept.text, kept.blocks) == (again.features, again.text, again.blocks)
        assert kept.total == kept.features + kept.keys + kept.text + kept.blocks

    @pytest.mark.parametrize("recompute", [False, True])
    def test_most_frames_is_exact(self, recompute: bool) -> None:
        model, given = MODELS["llama3v"], {"dtype": "bfloat16", "recompute": recompute}
        most = most_frames(model, 2048, 16, 80e9, **given)
        assert memory(model, 2048, most, 16, **given).total <= 80e9
        assert memory(model, 2048, most + 1, 16, **given).total > 80e9

    def test_most_frames_is_0_if_text_does_not_fit(self) -> None:
        given = {"dtype": "bfloat16", "recompute": True}
        assert most_frames(MODELS["llama3v"], 2048, 1, 1e6, **given) == 0


class TestWholeModel:
    SMALL = Whole(
        Model("small", 3, 2, 1, 5, cross_layers=7, blocks=2, tokens_per_frame=11),
        Stack(2, 3, 4, 2, 6, 13, 3), Stack(3, 4, 2, 2, 9, 8), vocabulary=17, tables=2, patches=19,
        vision_width=23, cross_mlp=29,
    )  # fmt: skip

    def test_weights_are_counted_once(self) -> None:
        text = 2 * (3 * 4 * 6 + 3 * 2 * 6 + 3 * 2 * 6 + 4 * 6 * 3 + 3 * 3 * 13)  # q k v o, MLP
        tower = 3 * (4 * 4 * 2 * 9 + 2 * 4 * 8) + 588 * 4
        cross = 7 * (3 * 2 * 5 + 23 * 5 + 23 * 5 + 2 * 5 * 3 + 2 * 3 * 29)
        assert self.SMALL.parameters == text + tower + cross + 2 * 17 * 3

    def test_time_is_that_of_the_arithmetic(self) -> None:
        """Of products with weights: attention between tokens is free here, but for the tower's."""
        machine, given = replace(FREE, matmul=8.0), {"dtype": "float32", "schedule": "lv-xattn"}
        nothing = step(self.SMALL, replace(FREE, matmul=1e30), 4, 6, 1, **given)
        assert nothing.total < 1e-12
        found = step(self.SMALL, machine, 0, 6, 2, **given)  # 3 frames a rank
        tower = 3 * 19 * self.SMALL.tower_parameters + 3 * 2 * 3 * 2 * 9 * 19 * 19
        assert found.tower == pytest.approx(tower)
        assert found.cross == pytest.approx(3 * 11 * self.SMALL.kv_parameters)
        assert found.text == 0
        one = step(self.SMALL, machine, 1, 0, 1, **given)
        scores = 2 * (2 + 2.5) * 2 * 4 * 6 * 2 / 8  # layers, passes, q k and p v
        assert one.text == pytest.approx(self.SMALL.text_parameters + scores)

    @pytest.mark.parametrize("schedule", ["lv-xattn", "ring"])
    def test_cross_attention_takes_as_long_as_its_layers(self, schedule: str) -> None:
        whole, machine = WHOLE["mplug-owl3-7b"], MACHINES["a30-8"]
        q, k = whole.attention.shapes(512, 64)
        of = planned(q, k, 8, schedule=schedule)
        layer = sum(play(of, machine, backward=backward).seconds for backward in (False, True))
        given = {"dtype": "bfloat16", "schedule": schedule}
        found = step(whole, machine, 512, 64, 8, **given)
        idle = step(whole, replace(machine, matmul=1e30), 512, 64, 8, **given)
        assert found.cross > whole.attention.cross_layers * layer
        assert found.tower > idle.tower
        projections = 8 * 729 * whole.kv_parameters * 8 / machine.matmul
        assert found.cross == pytest.approx(4 * layer + projections)

    @pytest.mark.parametrize("name", sorted(WHOLE))
    def test_most_frames_fit_and_one_more_does_not(self, name: str) -> None:
        found = []
        for recompute in (False, True):
            given: dict[str, Any] = {"dtype": "bfloat16", "recompute": recompute}
            n = most_frames_of_step(WHOLE[name], 512, 8, 80e9, **given)
            assert step_memory(WHOLE[name], 512, n, 8, **given) <= 80e9
            assert step_memory(WHOLE[name], 512, n + 8, 8, **given) > 80e9
            # What cross-attention alone has room for, less the weights.
            assert n < most_frames(WHOLE[name].attention, 512, 8, 80e9, **given)
            found.append(n)
        assert found[0] < found[1]

    def test_every_model_has_a_whole_one(self) -> None:
        assert set(WHOLE) == set(MODELS)

    def test_command_prints_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--model", "openflamingo-9b", "--ranks", "3", "--frames", "7"]) == 0
        said = capsys.readouterr().out
        _, rows = said.split("  a step of the whole model")
        assert [row.split()[0] for row in rows.splitlines()[1:5]] == [
            "lv-xattn", "ring", "grid", "gather",
        ]  # fmt: skip
        assert "8.1 billion weights" in rows
        assert max(map(len, rows.splitlines())) <= 100


class TestCommand:
    def test_output_in_docs_is_current(self, capsys: pytest.CaptureFixture[str]) -> None:
        root = Path(__file__).parents[1]
        page, readme = ((root / name).read_text() for name in ("docs/commands.md", "README.md"))
        (shown,) = re.findall(r"\nLV-XAttn plan\n.*?\n(?=```)", page, re.DOTALL)
        (step,) = re.findall(r"\n  a step of the whole model.*?\n(?=```)", page, re.DOTALL)
        (part,) = re.findall(r"\$ python -m lvxattn.plan .*\n([^`]*)", readme)
        line = "--model llama3v --frames 1200 --text-tokens 2048 --machine a100-16"
        assert main(line.split()) == 0
        said = capsys.readouterr().out
        assert said.startswith(shown.lstrip("\n"))
        assert said.endswith(step)
        lines = [line for line in part.splitlines() if line != "  ..."]
        assert len(lines) == 4
        assert set(lines) <= set(said.splitlines())
        assert "16,260" in said

    @pytest.mark.parametrize(
        ("ranks", "ranks_per_host", "said"),
        [
            (1, 1, "not measured, by 1 rank"),
            (4, 4, "measured inside a host;"),
            (4, 1, ""),
            (8, 4, ""),
        ],
    )
    def test_link_that_was_not_measured_is_named(
        self, ranks: int, ranks_per_host: int, said: str, tmp_path: Path, capsys: Any
    ) -> None:
        link = Link(1e9, 1e-5)
        machine = replace(
            MACHINES["a30-8"], measured=MEASURED, ranks=ranks, ranks_per_host=ranks_per_host,
            inside=link, between=replace(link, busy=0.5) if ranks == 8 else link,
        )  # fmt: skip
        machine.save(tmp_path / "file")
        line = ["--machine", str(tmp_path / "file"), "--model", "q-former", "--ranks"]
        for P, expected in (8, said), (ranks_per_host, ""):
            assert main([*line, str(P)]) == 0
            out = capsys.readouterr().out
            assert (f"\n  links     {expected}" in out) if expected else ("  links" not in out)

    def test_least_time_names_the_grid(self, capsys: pytest.CaptureFixture[str]) -> None:
        line = "--model mplug-owl3-7b --frames 11 --text-tokens 8192 --ranks 16 --machine a30-8"
        assert main(line.split()) == 0
        assert "\n  least time  grid 2x8\n" in capsys.readouterr().out

    @pytest.mark.parametrize("name", sorted(PROBLEMS))
    def test_fixed_problem_has_schedules_only(
        self, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        assert main(["--model", name, "--ranks", "4"]) == 0
        said = capsys.readouterr().out
        q, k = PROBLEMS[name].shapes()
        assert f"\n  shapes    q {q}   k {k}   v {k}   bfloat16\n" in said
        assert f"\n  problem   {name}, {PROBLEMS[name].about}, " in said
        assert said.splitlines()[-1].startswith("  least time  ")
        (ring,) = re.findall(r"\n  ring +(\d+) +(\S+ \S+) ", said)
        of = planned(q, k, 4, schedule="ring")
        most = max(sum(x.nbytes for x in messages(of, rank)) for rank in range(4))
        assert ring == ("3", format_bytes(most, ".1f"))
        assert max(map(len, said.splitlines())) <= 102

    def test_picture_shows_frames_that_fit(self) -> None:
        pytest.importorskip("matplotlib")
        from lvxattn.draw.plan import winners

        model, machine = MODELS["llama3v"], MACHINES["a30-8"]
        figure = winners(model, machine, 2, "float32", 64)
        said = [text.get_text() for axes in figure.axes for text in axes.texts]
        for title, recompute in (("kept", False), ("recomputed", True)):
            fit = most_frames(model, 64, 2, machine.room, dtype="float32", recompute=recompute)
            assert f"keys, values {title}: {fit:,} frames" in said
        assert f"all that a rank has: {machine.room / 1e9:.3g} GB" in said

    def test_picture_shows_every_number(self) -> None:
        pytest.importorskip("matplotlib")
        from lvxattn.draw.plan import FRAMES, TEXT, times, winners

        model, machine = MODELS["llama3v"], MACHINES["a30-8"]
        figure = winners(model, machine, 2, "float32")
        assert figure.bbox.width == 800
        ring, ours = (times(model, machine, 2, "float32", s) for s in ("ring", "lv-xattn"))
        shown = {text.get_position(): text for text in figure.axes[0].texts}
        assert len(shown) == 30
        for (text, frames), number in shown.items():
            at = TEXT.index(int(text)), FRAMES.index(int(frames))
            said = float(number.get_text().replace(",", ""))
            assert said == pytest.approx(ring[at] / ours[at], rel=0.06)
            assert number.get_size() >= 11

    def test_plot_is_written_and_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        file = tmp_path / "plan.png"
        assert main(["--machine", "a30-8", "--ranks", "2", "--plot", str(file)]) == 0
        assert file.stat().st_size > 10_000
        assert capsys.readouterr().out.endswith(f"\n\n  written   {file}\n")

    @pytest.mark.parametrize(
        ("line", "dtype", "words"),
        [
            ("", "float32", "\n"),
            ("--dtype bfloat16", "bfloat16", "; the plan has another dtype"),
            ("--model mplug-owl3-1b", "float32", "; the plan has other heads"),
            (
                "--dtype float64 --model mplug-owl3-1b",
                "float64",
                "; the plan has other heads and another dtype",
            ),
        ],
    )
    def test_dtype_defaults_to_the_measured_one(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, dtype: str, words: str
    ) -> None:
        replace(FREE, measured=MEASURED).save(tmp_path / "m.json")
        assert main(["--machine", str(tmp_path / "m.json"), "--ranks", "2", *line.split()]) == 0
        said = capsys.readouterr().out
        assert re.search(rf"\n  shapes .* {dtype}\n", said)
        assert (
            f"\n  measured  32/8 heads of 128 in float32, by mpi_impl on CPU, 2 cores{words}"
            in said
        )

    @pytest.mark.parametrize(
        ("frames", "words"),
        [
            (4878, "room for 4,878 frames either way"),
            (4879, "room for 4,879 frames only if they are recomputed"),
            (16260, "room for 16,260 frames only if they are recomputed"),
            (16261, "NO ROOM for 16,261 frames either way"),
        ],
    )
    def test_command_says_whether_frames_fit(
        self, capsys: pytest.CaptureFixture[str], frames: int, words: str
    ) -> None:
        assert main(["--frames", str(frames)]) == 0
        assert f"\n  a rank has 80.0 GB: {words}\n" in capsys.readouterr().out

    def test_one_rank_has_no_schedule_to_choose(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--ranks", "1", "--frames", "1"]) == 0
        said = capsys.readouterr().out
        assert "llama3v, 1 frame, " in said
        assert "a100-16: 1 rank, 1 a host\n" in said
        assert "least time  any: nothing is sent\n" in said

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("--machine h1000", "--machine: expected one of a100-16, "),
            ("--machine {bad}", "--machine: "),
            ("--machine /", "--machine: /: expected a regular file, got a directory"),
            ("--ranks 513", "--ranks: expected at most 512, got 513"),
            ("--plot {none}/x.png", "--plot: {none}/x.png cannot be written: there is no folder "),
            ("--plot {fifo}", "--plot: {fifo} cannot be written: expected a regular"),
            ("--frames 99999999999999999999", "--frames: expected a whole number from 1 up, below"),
            ("--plot x.xyz", "--plot: expected a name that ends in .png, .pdf, .svg, got x.xyz"),
            ("--frames 0", "--frames: "),
            ("--text-tokens 0", "--text-tokens: "),
            ("--model gpt", "--model: invalid choice: 'gpt'"),
            ("--model wan-14b --frames 3", "--frames: not allowed with --model wan-14b, whose "),
            ("--text-tokens 3 --model perceiver", "--text-tokens: not allowed with --model "),
            ("--model q-former --plot x.png", "--plot: not allowed with --model q-former, "),
        ],
    )
    def test_bad_command_line_prints_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
    ) -> None:
        (tmp_path / "bad.json").write_text("{}")
        os.mkfifo(tmp_path / "fifo.png")
        places = {"bad": tmp_path / "bad.json", "none": tmp_path / "none"}
        places["fifo"] = tmp_path / "fifo.png"
        given = line.format(**places).split()
        assert main(given) == 2
        said = capsys.readouterr()
        assert said.err.startswith(
            f"python -m lvxattn.plan: error: argument {words.format(**places)}"
        )
        assert said.err.count("\n") == 1
        assert said.out == ""

    def test_picture_without_matplotlib_is_refused_before_work(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(picture, "find_spec", lambda _: None)
        assert main(["--plot", "x.png"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.endswith("--plot: needs matplotlib, which is not installed\n")
