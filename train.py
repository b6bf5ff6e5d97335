"""Train, evaluate and sample: `python train.py fit|validate|test|predict --config configs/quickstart.yaml`."""

from moe_lightning.training.cli import MoECLI
from moe_lightning.utils.errors import plain_errors

if __name__ == "__main__":
    with plain_errors():
        MoECLI()
