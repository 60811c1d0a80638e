"""TMR (Petrovich et al., ICCV 2023): published weights for the encoders of common/retrieval.py."""


def from_official_tmr(state):
    """Published TMR weights (official names) -> the names here: one in_proj becomes the linears q, k, v."""
    out = {}
    for key, value in state.items():
        key = key.removeprefix("seqTransEncoder.").removeprefix("seqTransDecoder.")
        if "in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3)):
                out[key.replace("in_proj_", f"{name}.")] = part
        else:
            out[key] = value
    return out
