"""`python -m moe_lightning.export --export_onnx_dir DIR ...`; `--help` lists the flags."""

from moe_lightning.export.command import main
from moe_lightning.utils.errors import plain_errors

if __name__ == "__main__":
    with plain_errors():
        main()
