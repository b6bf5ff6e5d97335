import pytest
from router_reference import every_router

from moe_lightning.routers import ROUTERS, Router, router_class


def test_the_names_of_the_issue_are_there():
    assert set(ROUTERS) >= {
        "naive_topk",
        "masked_matmul",
        "fused_select",
        "sinkhorn",
        "topk",
        "aux_free",
        "quantile",
        "hash",
        "expert_choice",
        "expert_threshold",
    }


@every_router
def test_a_name_gives_its_class(name):
    assert router_class(name) is ROUTERS[name]
    assert issubclass(router_class(name), Router)
    assert router_class(name)(8, 4, 2).dispatch_mode in ("permute", "masked")


def test_classes_are_distinct():
    assert len(set(ROUTERS.values())) == len(ROUTERS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("naive_top_k", "naive_topk"), ("sinkhron", "sinkhorn"), ("fused-select", "fused_select"), ("masked", "masked_")],
)
def test_near_matches_are_offered(typed, meant):
    with pytest.raises(
        ValueError, match=rf"^router: name must be one of .*, got '{typed}'; did you mean [^\n]*{meant}"
    ):
        router_class(typed)


def test_with_nothing_near_all_names_are_listed():
    with pytest.raises(ValueError, match=r"one of naive_topk, .*, hash, .*, got 'zzz'$"):
        router_class("zzz")


def test_router_is_abstract():
    with pytest.raises(TypeError, match="select_experts"):
        Router(8, 4, 2)
