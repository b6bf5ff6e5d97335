"""`python -m moe_lightning.export --export_onnx_dir DIR ...`; `--help` lists the flags."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_lightning.export import check_packages
from moe_lightning.export.directory import MODEL_FILE, PARAMS_FILE
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checkpoint_file import load_checkpoint
from moe_lightning.utils.checks import check_choice
from moe_lightning.utils.cli import Parser
from moe_lightning.utils.errors import plain_errors

with plain_errors():
    check_packages()

from moe_lightning.export.model_files import checkpoint_metadata, export_onnx
from moe_lightning.export.moe_forms import MOE_FORMS
from moe_lightning.export.sources import SIZES, fresh_model, network_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def parser() -> Parser:
    """Sizes that are left out are the model's defaults."""
    parser = Parser("export", f"Write a model as ONNX, {MODEL_FILE} and {PARAMS_FILE}, and check it in onnxruntime.")
    parser.add_argument(
        "--export_onnx_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the model files go: any folder, also ../x, but none that a symbolic link leads to",
    )
    parser.add_argument("--model", help=f"{', '.join(SIZES)}; default mlp")
    parser.add_argument("--ckpt_path", type=Path, metavar="FILE", help="a trained model, sizes and router its own")
    parser.add_argument("--device", default="cpu", help="cpu, where graphs are traced")
    parser.add_argument("--dtype", default="fp32", help=", ".join(DTYPES))
    parser.add_argument("--batch", type=int, default=2, help="rows of the traced input; the axis is dynamic")
    parser.add_argument("--seq_len", type=int, help="tokens of the traced input; the axis is dynamic; default 128")
    for size in dict.fromkeys(size for sizes in SIZES.values() for size in sizes):
        default = next(sizes[size] for sizes in SIZES.values() if size in sizes)
        parser.add_argument(f"--{size}", type=int, help=f"default {default}")
    parser.add_argument("--router", help=f"{', '.join(ROUTERS)}; default fused_select")
    default_form = next(iter(MOE_FORMS))
    parser.add_argument("--onnx_moe", default=default_form, help=f"form of an MoE layer: {', '.join(MOE_FORMS)}")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Export, check and print the sizes; ValueError for what a user can mend."""
    flags = parser().parse_args(argv)
    check_choice("export", "device", flags.device, ("cpu",))
    check_choice("export", "dtype", flags.dtype, DTYPES)
    names = SIZES["mlp"] | SIZES["decoder_moe"]
    sizes = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if flags.ckpt_path is not None:
        given = [f"--{name}" for name in ("model", "router", *sizes) if getattr(flags, name) is not None]
        if given:
            raise ValueError(f"export: a checkpoint brings its own model, got {', '.join(given)}; leave those out")
        checkpoint = load_checkpoint(flags.ckpt_path)
        model, metadata = network_of(checkpoint, flags.ckpt_path), checkpoint_metadata(checkpoint)
    else:
        name = flags.model or "mlp"
        if name == "mlp" and flags.seq_len is not None:
            raise ValueError(f"export: mlp has no sequence, got --seq_len {flags.seq_len}; leave it out")
        model, metadata = fresh_model(name, sizes, flags.router), {}
    done = export_onnx(
        model,
        flags.export_onnx_dir,
        batch=flags.batch,
        seq_len=128 if flags.seq_len is None else flags.seq_len,
        dtype=DTYPES[flags.dtype],
        moe_form=flags.onnx_moe,
        metadata=metadata,
    )
    print(f"{flags.export_onnx_dir / MODEL_FILE}   {done.model_bytes / 1e3:,.1f} KB, {done.nodes} nodes")
    print(f"{flags.export_onnx_dir / PARAMS_FILE}  {done.params_bytes / 1e6:,.1f} MB")
    shape = " x ".join(map(str, done.checked_shape))
    print(f"onnxruntime on random {shape}: largest difference {done.largest_difference:.1e}")


if __name__ == "__main__":
    with plain_errors():
        main()
