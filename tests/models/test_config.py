"""The sizes of a decoder: one object for a network and its copies."""

import copy
import threading
from functools import partial

from moe_lightning.models import DecoderMoE
from moe_lightning.models.config import DecoderMoEConfig
from moe_lightning.routers import NaiveTopK


def test_a_copied_network_shares_its_config_whose_router_factory_may_hold_what_cannot_be_copied():
    lock = threading.Lock()  # as a process group, which the command line's factory reaches

    def router(d_model, num_experts, top_k, _lock=lock):
        return NaiveTopK(d_model, num_experts, top_k)

    sizes = {"vocab_size": 7, "d_model": 8, "n_heads": 2, "n_layers": 1, "mlp_hidden_dim": 8, "num_experts": 2}
    network = DecoderMoE(DecoderMoEConfig(**sizes, top_k=1, router=partial(router, _lock=lock)))
    copied = copy.deepcopy(network)
    assert copied.config is network.config
    assert copied.head.weight is not network.head.weight
