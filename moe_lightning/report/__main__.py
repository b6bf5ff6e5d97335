"""`python -m moe_lightning.report RUN [RUN ...] [--bench FILE ...] --out report.html`."""

from moe_lightning.report.command import main
from moe_lightning.utils.errors import plain_errors

if __name__ == "__main__":
    with plain_errors():
        main()
