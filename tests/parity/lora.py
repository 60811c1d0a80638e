"""Compare LoRA layers with reference arrays of peft (see tests/parity)."""
import torch

from common import lora
from tests.parity.rows import check_cases


def check(path):
    """Run the project's code on the inputs of one reference file -> [(field, max_error, tolerance)]."""
    return check_cases(path, check_lora)


def check_lora(result, path, case, ref):
    """One adapted layer: output on, off and merged, gradients, scale and number of trained values."""
    weight, x = torch.from_numpy(ref["W"]), torch.from_numpy(ref["x"])
    rank, scaling = int(ref["r"]), float(ref["scaling"])
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias="b" in ref)
    if weight.ndim == 3:
        same = x.shape[-1] - ref["y_base"].shape[-1]
        layer = torch.nn.Conv1d(weight.shape[1], weight.shape[0], weight.shape[2], bias="b" in ref,
                                padding=(weight.shape[2] - 1 - same) // 2)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if "b" in ref:
            layer.bias.copy_(torch.from_numpy(ref["b"]))
    model = torch.nn.Sequential(layer)
    # rslora divides alpha by sqrt(rank) instead of rank and is otherwise the same
    lora.inject(model, "^0$", rank, float(ref["alpha"]) * (rank**0.5 if case.endswith("rslora") else 1))
    result.compare("scaling", model[0].scaling, scaling, 1e-12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    result.compare("n_trainable", lora.count(trained), ref["n_trainable"], 0)
    values = {f"0.{name}": torch.from_numpy(ref[name]) for name in "AB"}
    lora.load(model, values | {"0.scaling": model[0].scaling})
    y = model(x)
    result.compare("y_lora", y, ref["y_lora"], 1e-5)
    (0.5 * (y * torch.from_numpy(ref["c"])).sum()).backward()
    result.compare("gradA", model[0].A.grad, ref["gradA"], 1e-5)
    result.compare("gradB", model[0].B.grad, ref["gradB"], 1e-5)
    with lora.scaled(model, 0.0):
        result.compare("y_disabled", model(x), ref["y_disabled"], 1e-5)
        result.compare("y_base", model(x), ref["y_base"], 1e-5)
    change = (model[0].B.flatten(1) @ model[0].A.flatten(1)).view_as(weight)
    model[0].base.weight.data += scaling * change
    result.compare("W_merged", model[0].base.weight, ref["W_merged"], 1e-5)
    result.compare("y_merged", model[0].base(x), ref["y_merged"], 1e-5)
