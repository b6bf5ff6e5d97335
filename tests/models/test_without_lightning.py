"""Floor 4 stands by itself."""

import subprocess
import sys

SCRIPT = """
import sys
for name in ("lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "onnx", "onnxruntime",
             "onnxscript", "tensorboard", "jsonargparse"):
    sys.modules[name] = None  # importing it raises
import torch
from moe_lightning.models import DecoderMoE, DecoderMoEConfig, generate
sizes = {'d_model': 16, 'n_heads': 2, 'n_layers': 1, 'mlp_hidden_dim': 16, 'num_experts': 4}
model = DecoderMoE(DecoderMoEConfig(vocab_size=31, **sizes))
tokens = torch.randint(0, 31, (2, 9))
output = model(tokens[:, :-1])
loss = torch.nn.functional.cross_entropy(output.logits_BSV.flatten(0, 1), tokens[:, 1:].flatten())
loss.backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
print(len(generate(model.eval(), tokens[:1], 3, context_length=8)[0]))
print(*sorted({m for m in sys.modules if m.startswith("moe_lightning.") and sys.modules[m]}))
"""


def test_a_model_trains_and_generates_with_the_upper_floors_packages_missing():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    length, loaded = run.stdout.splitlines()
    assert length == "12"
    floors = {name.split(".")[1] for name in loaded.split()}
    assert floors <= {"_cpu", "_cuda", "utils", "ops", "routers", "layers", "models"}
    assert floors >= {"ops", "routers", "layers", "models"}
