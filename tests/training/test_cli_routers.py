"""Every model and router by its name, wherever a name can stand."""

import sys

import pytest
import yaml
from tiny_run import DATA, ROOT, TINY, TRAINER, first_router, run_cli

from moe_lightning.routers import ROUTERS
from moe_lightning.training.config import MODELS, expand_arguments, expand_config

FAST = "--trainer.fast_dev_run=true"
STACKED = {"seed_everything": 1, "model": {"name": "decoder_moe", "d_model": 16, "n_heads": 2, "n_layers": 1}}


def write(folder, name, config):
    (folder / name).write_text(yaml.safe_dump(config))
    return f"--config={name}"


def router_config(name, **arguments):
    return {"model": {**STACKED["model"], "router": {"name": name, **arguments}}}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_a_batch(folder, losses, name):
    cli = run_cli("fit", f"--model={name}", "--model.d_model=16", FAST, tiny=[*DATA, *TRAINER])
    assert type(cli.model) is MODELS[name]
    assert cli.trainer.global_step == 1
    assert 5 < losses[0] < 6.5  # near ln 257 = 5.5 before anything is learnt


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_trains_by_flag(folder, losses, name):
    cli = run_cli("fit", f"--model.router={name}", FAST)
    assert {type(layer.router) for layer in cli.model.network.moe_layers} == {ROUTERS[name]}
    assert len(losses) == 1


@pytest.mark.parametrize("form", ["name", "mapping", "class_path"])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_in_yaml(folder, parsed, name, form):
    path = f"{ROUTERS[name].__module__}.{ROUTERS[name].__name__}"
    router = {"name": name, "mapping": {"name": name, "skew_experts": 1}, "class_path": {"class_path": path}}[form]
    config = write(folder, "run.yaml", {"model": {**STACKED["model"], "router": router}})
    router = first_router(parsed(config, tiny=[*DATA, *TRAINER]))
    assert type(router) is ROUTERS[name]
    assert router.skew_experts == (form == "mapping")


@pytest.mark.parametrize("name", ROUTERS)
def test_every_stacked_router_file(folder, parsed, name):
    config = write(folder, "run.yaml", router_config("sinkhorn", iterations=3, temperature=0.5))
    stacked = parsed(config, f"--config={ROOT}/configs/router/{name}.yaml", tiny=[*DATA, *TRAINER])
    assert type(first_router(stacked)) is ROUTERS[name]
    assert stacked.model.network.config.d_model == 16  # the run's other settings stand


def test_every_router_has_a_file_to_stack():
    assert {path.stem for path in (ROOT / "configs/router").glob("*.yaml")} == set(ROUTERS)


def test_flags_with_a_space_or_an_equals_sign(parsed):
    for flags in (["--model.router", "sinkhorn", "--model.router.iterations", "3"], ["--model.router=sinkhorn"]):
        assert type(first_router(parsed(*flags))) is ROUTERS["sinkhorn"]


def test_a_flag_value_that_looks_like_a_name_is_left_alone():
    arguments = ["fit", "--data.prompt", "--model", "--x", "mlp", "--model", "mlp"]
    assert expand_arguments(arguments[3:]) == ["--x", "mlp", "--model", "moe_lightning.training.modules.MLPModule"]


def test_expanding_leaves_its_input_alone():
    config = {"model": {"name": "decoder_moe", "router": {"name": "sinkhorn", "iterations": 3}}}
    before = yaml.safe_dump(config)
    expanded = expand_config(config)
    assert yaml.safe_dump(config) == before
    assert expand_config(expanded) == expanded


def test_router_arguments_reach_the_router(folder, parsed):
    flags = ["--model.router=sinkhorn", "--model.router.iterations=3", "--model.router.temperature=0.5"]
    config = write(folder, "run.yaml", router_config("sinkhorn", iterations=3, temperature=0.5))
    for cli in (parsed(*flags), parsed(config, tiny=[*DATA, *TRAINER])):
        for layer in cli.model.network.moe_layers:
            assert (layer.router.iterations, layer.router.temperature) == (3, 0.5)


@pytest.mark.parametrize("name", ROUTERS)
def test_skew_on_any_router(parsed, name):
    skew = ["--model.router.skew_experts=2", "--model.router.skew_bias=1.5"]
    assert first_router(parsed(f"--model.router={name}", *skew)).skew_E.tolist() == [1.5, 1.5, 0, 0]


def test_skew_on_the_default_router(parsed):
    router = first_router(parsed("--model.router.skew_experts=2", "--model.router.skew_bias=1.5"))
    assert router.skew_E.tolist() == [1.5, 1.5, 0, 0]


def test_skew_on_the_router_of_a_configuration(folder, parsed):
    config = write(folder, "run.yaml", router_config("naive_topk"))
    router = first_router(parsed(config, "--model.router.skew_experts=2", tiny=[*DATA, *TRAINER]))
    assert (type(router), router.skew_experts) == (ROUTERS["naive_topk"], 2)


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"sinkhorn"}))
def test_switching_the_router_leaks_no_argument(folder, parsed, name):
    config = write(folder, "run.yaml", router_config("sinkhorn", iterations=3, temperature=0.5))
    by_flag = parsed(config, f"--model.router={name}", tiny=[*DATA, *TRAINER])
    by_file = parsed(config, write(folder, "other.yaml", {"model": {"router": name}}), tiny=[*DATA, *TRAINER])
    by_mapping = parsed(
        config, write(folder, "map.yaml", {"model": {"router": {"name": name}}}), tiny=[*DATA, *TRAINER]
    )
    by_flags = parsed("--model.router=sinkhorn", "--model.router.iterations=3", f"--model.router={name}")
    for cli in (by_flag, by_file, by_mapping, by_flags):
        assert type(first_router(cli)) is ROUTERS[name]
        assert not {"iterations", "temperature"} & set(cli.model.hparams["router"]["init_args"])


def test_sinkhorn_after_another_router_has_its_own_defaults(folder, parsed):
    first = write(folder, "first.yaml", router_config("sinkhorn", iterations=3))
    second = write(folder, "second.yaml", {"model": {"router": "naive_topk"}})
    router = first_router(parsed(first, second, "--model.router=sinkhorn", tiny=[*DATA, *TRAINER]))
    assert router.iterations == 10


def test_own_router_by_import_path(folder, parsed, monkeypatch):
    source = """
from moe_lightning.routers import NaiveTopK

class MyRouter(NaiveTopK):
    def __init__(self, d_model, num_experts, top_k, *, spice: int = 1, **kwargs):
        super().__init__(d_model, num_experts, top_k, **kwargs)
        self.spice = spice
"""
    (folder / "own_router_of_a_user.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    arguments = {"spice": 7, "skew_experts": 2}
    config = write(
        folder,
        "run.yaml",
        {
            "model": {
                **STACKED["model"],
                "router": {"class_path": "own_router_of_a_user.MyRouter", "init_args": arguments},
            }
        },
    )
    flags = ["--model.router=own_router_of_a_user.MyRouter", "--model.router.spice=7", "--model.router.skew_experts=2"]
    for router in (first_router(parsed(*flags)), first_router(parsed(config, tiny=[*DATA, *TRAINER]))):
        assert type(router).__name__ == "MyRouter"
        assert (router.spice, router.skew_experts) == (7, 2)
    monkeypatch.delitem(sys.modules, "own_router_of_a_user")


def test_own_router_survives_in_a_checkpoint(folder, monkeypatch):
    (folder / "kept_router_of_a_user.py").write_text(
        "from moe_lightning.routers import NaiveTopK as Base\n\nclass Kept(Base): ...\n"
    )
    monkeypatch.syspath_prepend(folder)
    save = ["--trainer.max_steps=2", "--checkpoint.every_n_train_steps=2", "--checkpoint.monitor=null"]
    run_cli("fit", "--model.router=kept_router_of_a_user.Kept", *save, "--checkpoint.dirpath=saved")
    cli = run_cli("test", "--ckpt_path=saved/last.ckpt", tiny=TRAINER)
    assert type(first_router(cli)).__name__ == "Kept"
    monkeypatch.delitem(sys.modules, "kept_router_of_a_user")


def test_tiny_run_uses_the_default_router(parsed):
    assert type(first_router(parsed(tiny=TINY))) is ROUTERS["fused_select"]
