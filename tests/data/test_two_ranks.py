import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from data_processes import RankRecorder
from lightning.pytorch.strategies import DDPStrategy

from moe_lightning.data import TextDataModule


@pytest.mark.slow
def test_ranks_share_the_text_and_get_the_same_prompts(tmp_path, text_file):
    options = {"path": text_file, "seq_len": 99, "cache_dir": tmp_path / "cache", "prompt": ["one", "two"]}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="forkserver"),
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(RankRecorder(str(tmp_path)), datamodule=TextDataModule(batch_size=5, **options))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = TextDataModule(batch_size=10, **options)
    for step, left, right in zip(alone.train_dataloader(), ranks[0]["train"], ranks[1]["train"], strict=True):
        assert sorted(step.tolist()) == sorted(left + right)
    assert ranks[0]["validation"] != ranks[1]["validation"]
    assert [len(batch) for batch in ranks[0]["validation"]] == [len(batch) for batch in ranks[1]["validation"]]
    assert ranks[0]["prompts"] == ranks[1]["prompts"] == ["one", "two"]


def test_ranks_with_different_text_are_refused(tmp_path, text_file):
    data = TextDataModule(path=text_file, seq_len=99, batch_size=5, cache_dir=tmp_path / "cache")
    data.trainer = SimpleNamespace(
        world_size=2,
        global_rank=0,
        overfit_batches=0,
        strategy=SimpleNamespace(
            root_device=torch.device("cpu"), all_gather=lambda mine: torch.stack([mine, mine + 1])
        ),
    )
    with pytest.raises(ValueError, match=r"^data: every rank must read the same text, got different text"):
        data.train_dataloader()
