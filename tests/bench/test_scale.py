"""The cost model by hand, against cases it made itself, and its command."""

import json
from dataclasses import replace

import pytest

from moe_lightning.bench.__main__ import main
from moe_lightning.bench.ep.scale import Cluster, Layer, Link, check, fit_layers, fit_link
from moe_lightning.bench.spread import Spread

FAST, SLOW = Link(10.0, 100.0), Link(20.0, 25.0)
BYTES = 4000 * 2 * 4000 * 2.0  # of a rank's rows, 64 MB
LAYER = Layer(
    "fused_select",
    BYTES,
    route_us=50.0,
    count_exchange_us=30.0,
    compute_us=800.0,
    chunking_us=20.0,
    per_chunk_us=5.0,
    rank_skew=1.0,
)


def test_link_is_found_again():
    link = fit_link((size, FAST.us(size)) for size in (1e4, 1e6, 1e8))
    assert (link.latency_us, link.gb_per_s) == pytest.approx((10.0, 100.0))
    # 16.8 us at 2 MB: the x of least (x / 15 - 1)^2 + (x / 20 - 1)^2
    link = fit_link([(1e6, 10.0), (2e6, 15.0), (2e6, 20.0)])
    assert (link.latency_us, link.gb_per_s) == pytest.approx((3.2, 1 / 6.8e-3))
    with pytest.raises(ValueError, match="at least two message sizes"):
        fit_link([(1e6, 20.0)])
    with pytest.raises(ValueError, match="larger messages must take longer"):
        fit_link([(1e4, 20.0), (1e6, 10.0)])


def test_an_exchange_inside_and_between_nodes():
    cluster = Cluster(4, FAST, SLOW)
    assert cluster.exchange_us(BYTES, 2) == pytest.approx(10 + 320)  # half of the rows, nothing between nodes
    assert cluster.exchange_us(BYTES, 8) == pytest.approx(20 + 32e6 / 25e3)  # half goes to the other node
    assert Cluster(8, FAST, SLOW).exchange_us(BYTES, 8) == pytest.approx(10 + 56e6 / 100e3)


def test_a_layer_by_hand():
    pair = Cluster(2, FAST, FAST)
    one = LAYER.predict(pair, 2, 1, 1.0)
    assert one["T_comm"] == pytest.approx(660)
    assert one["T_seq"] == pytest.approx(80 + 660 + 800)
    assert one["T_overlapped"] == pytest.approx(one["T_seq"])  # there is nothing to do meanwhile
    assert one["eta_overlap"] == pytest.approx(0)
    two = LAYER.predict(pair, 2, 2, 1.0)  # 170 a chunk: there at 170 and 340; work of 400 each; back as they are done
    assert two["T_overlapped"] == pytest.approx(80 + 170 + 400 + 400 + 170 + 20 + 2 * 5)
    assert two["eta_overlap"] == pytest.approx((1540 - 1250) / 660)
    skewed = LAYER.predict(pair, 2, 1, 2.0)
    assert skewed["T_seq"] == pytest.approx(80 + 2 * 660 + 2 * 800)


def made(layer, chunk_counts=(1, 2, 4), ranks=2):
    """A record of `bench ep` as the model itself would have measured it."""
    cases = []
    for chunks in chunk_counts:
        times = layer.predict(Cluster(8, FAST, FAST), ranks, chunks, layer.rank_skew)
        blocking = layer.predict(Cluster(8, FAST, FAST), ranks, 1, layer.rank_skew)
        cases.append(
            {
                "router": layer.router,
                "chunks": chunks,
                "T_logit": 20.0,
                "T_select": 10.0,
                "T_pack": 20.0,
                "T_comm": blocking["T_comm"],
                "T_comp": 50.0 + layer.compute_us * layer.rank_skew,
                "T_seq": blocking["T_seq"],
                "T_overlapped": times["T_overlapped"],
                "rank_max_over_mean": layer.rank_skew,
            }
        )
    settings = {
        "dtype": "fp16",
        "tokens": 4000,
        "top_k": 2,
        "d_model": 4000,
        "mlp_hidden_dim": 2048,
        "num_experts": 32 * ranks,
    }
    return {"settings": settings | {"backward": False}, "link": {"ranks": ranks}, "cases": cases}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("skew", [1.0, 1.4])
def test_a_layer_is_found_again(skew, ranks):
    layer = Layer("sinkhorn", BYTES, 50.0, 30.0, 800.0, 20.0, 5.0, skew)
    record = made(layer, ranks=ranks)
    found = fit_layers(record, FAST)["sinkhorn"]
    assert found.compute_us == pytest.approx(800)
    assert found.count_exchange_us == pytest.approx(30)
    assert (found.chunking_us, found.per_chunk_us) == pytest.approx((20, 5))
    for seen in (record, made(layer, ranks=8)):
        assert all(abs(row["error"]) < 1e-6 for row in check(seen, {"sinkhorn": found}, Cluster(8, FAST, SLOW)))


@pytest.mark.parametrize(
    ("beyond", "chunking_us", "per_chunk_us"),
    [
        ({2: 30.0}, 0.0, 15.0),  # nothing says how it grows
        ({2: 30.0, 4: 30.0}, 30.0, 0.0),
        ({2: 10.0, 4: 20.0}, 0.0, 5.0),
        ({2: 0.0, 4: 20.0}, 0.0, 4.0),  # below 0 once: each alone, (2 * 0 + 4 * 20) / (2 * 2 + 4 * 4)
        ({2: 30.0, 4: 10.0}, 20.0, 0.0),  # below 0 each: once alone, their mean
        ({2: -30.0, 4: -10.0}, 0.0, 0.0),
        ({}, 0.0, 0.0),
    ],
)
def test_what_chunks_cost_is_never_negative(beyond, chunking_us, per_chunk_us):
    free = replace(LAYER, chunking_us=0.0, per_chunk_us=0.0)
    record = made(free, chunk_counts=(1, *beyond))
    whole = 1e6  # as good as the same for all, so that all weigh the same
    for case in record["cases"]:
        case["T_seq"] += whole
        case["T_overlapped"] += whole + beyond.get(case["chunks"], 0.0)
    found = fit_layers(record, FAST)["fused_select"]
    assert (found.chunking_us, found.per_chunk_us) == pytest.approx((chunking_us, per_chunk_us), abs=0.01)


def test_measured_again_is_the_mean():
    record = made(LAYER, chunk_counts=(1, 2, 2))
    for case, more in zip(record["cases"], (-60.0, 0.0, 60.0), strict=True):
        case["T_seq"] += more
    found = fit_layers(record, FAST)["fused_select"]
    assert (found.count_exchange_us, found.chunking_us, found.per_chunk_us) == pytest.approx((30, 0, 20 / 2 + 5))


@pytest.fixture
def records(tmp_path):
    """Paths of records: bench ep on 2 and on 4 ranks, bench link."""
    rows = [{"bytes": size, "us": FAST.us(size), "way": "all_to_all"} for size in (1e4, 1e6, 1e8)]
    four = made(LAYER, ranks=4)
    for what in ("T_seq", "T_overlapped"):
        four["cases"][2][what] *= 2  # what the model cannot know
    found = {"ep": made(LAYER), "four": four, "link": {"kind": "NVLink", "rows": rows}}
    for name, results in found.items():
        record = {"name": "link" if name == "link" else "ep", "results": results}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    return {name: tmp_path / f"{name}.json" for name in found}


def of(records):
    """The flags that name them."""
    return [f"--ep={records['ep']}", f"--link={records['link']}", f"--held_out={records['four']}"]


def test_command(records, tmp_path, capsys):
    out, picture = tmp_path / "scale.json", tmp_path / "scale.png"
    files = ["--json", str(out), "--plot", str(picture)]
    assert main(["scale", *of(records), "--ranks", "2", "16", "1024", *files]) == 0
    printed = capsys.readouterr().out
    assert "NVLink, 10.0 us + 100.0 GB/s" in printed
    assert "the model and the records it was fitted to: all within 15%" in printed
    assert "the model and held-out records: 2 of 6 are over 15% off" in printed
    results = json.loads(out.read_text())["results"]
    assert results["settings"]["chunks"] == [1, 2, 4]  # those measured
    best = {(row["skew"], row["ranks"]): row for row in results["best"]}
    assert set(best) == {(skew, ranks) for skew in (1.0, 2.0) for ranks in (2, 16, 1024)}
    assert best[1.0, 16]["T_seq"] > best[1.0, 2]["T_seq"]  # the network between nodes is slower
    assert best[2.0, 2]["T_overlapped"] > best[1.0, 2]["T_overlapped"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [row["ranks"] for row in results["held_out"]] == [4] * 6
    assert [row["error"] for row in results["held_out"]] == pytest.approx([0, 0, 0, 0, -0.5, -0.5])
    assert main(["scale", *of(records), "--node", "1"]) == 0  # the link is what was measured on
    assert "the model and the records it was fitted to: all within 15%" in capsys.readouterr().out


def test_no_verdict_on_measurements_that_are_too_noisy(records, capsys):
    record = json.loads(records["four"].read_text())
    for i, case in enumerate(record["results"]["cases"]):
        for what in ("T_seq", "T_overlapped"):
            us = case[what]
            spread = Spread.of([us, us, 2 * us if i == 2 else us])
            case.setdefault("spread", {})[what] = spread.as_record()
    records["four"].write_text(json.dumps(record))
    assert main(["scale", *of(records)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the model and held-out records: 2 of 6 are too noisy to tell, all within 15%" in printed
    assert "±25%" in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 64}, "experts per rank 32, got 16"),
        ({"tokens": 16000}, "tokens 4000, got 16000"),
        ({"backward": True}, "backward False, got True"),
    ],
)
def test_a_held_out_record_of_another_layer_is_refused(change, said, records, capsys):
    record = json.loads(records["four"].read_text())
    record["results"]["settings"] |= change
    records["four"].write_text(json.dumps(record))
    assert main(["scale", *of(records)]) == 2
    assert f"--held_out must be of the layer of --ep, {said}" in capsys.readouterr().err


def test_what_the_model_does_not_know_is_refused(records, capsys):
    record = json.loads(records["four"].read_text())
    record["results"]["cases"][0]["router"] = "sinkhorn"
    records["four"].write_text(json.dumps(record))
    assert main(["scale", *of(records)]) == 2
    assert "--held_out must be of the routers of --ep, got sinkhorn" in capsys.readouterr().err
    record["results"]["settings"]["backward"] = True
    records["ep"].write_text(json.dumps(record))
    assert main(["scale", *of(records)]) == 2
    assert "the model is of a layer forward, got --ep with backward" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ep", "nowhere.json"], "--ep must be a readable record, got nowhere.json"),
        (["--skew", "0.5"], "skew is max/mean, at least 1, got skew=0.5"),
        (["--ranks", "1"], "ranks must be in [2,"),
        (["--network_gb_per_s", "0"], "network_gb_per_s must be positive"),
    ],
)
def test_bad_input_is_one_line(flags, said, tmp_path, capsys):
    record = tmp_path / "link.json"
    record.write_text(json.dumps({"name": "link", "results": {}}))
    assert main(["scale", "--ep", str(record), "--link", str(record), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert said in error


def test_a_record_of_something_else_is_refused(tmp_path, capsys):
    record = tmp_path / "link.json"
    record.write_text(json.dumps({"name": "link", "results": {}}))
    assert main(["scale", "--ep", str(record), "--link", str(record)]) == 2
    assert "--ep must be a record of bench ep, got one of 'link'" in capsys.readouterr().err
