"""Choice of the attention kernel, by diffusers' names of attention backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo.types import UserError

#: PyTorch's own attention, which picks its kernel; diffusers calls it "native"
_ALIASES = {"sdpa": "native"}


def set_attention_backend(transformer: Any, name: str) -> None:
    """Let all attention layers of a diffusers transformer use a backend.

    Args:
        name: ``sdpa``, or one of diffusers' names: ``native``, ``flash``, ``_flash_3``, ``sage``,
            ``xformers``, ``_native_cudnn``...

    Raises:
        UserError: unknown name, or a backend whose package or hardware is missing.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
    from diffusers.utils import logging

    known = sorted(backend.value for backend in AttentionBackendName)
    backend = _ALIASES.get(name, name)
    if backend not in known:
        raise UserError(
            f"model.attention_backend: expected one of {', '.join(['sdpa', *known])}, got '{name}'"
        )
    for module in transformer.modules():
        # SD3's own processor calls PyTorch's attention whatever the backend
        if isinstance(module, Attention) and type(module.processor) is JointAttnProcessor2_0:
            module.set_processor(JointAttention())
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that backends may change
    try:
        transformer.set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(f"model.attention_backend '{name}' cannot be used here: {error}") from None
    finally:
        logging.set_verbosity(verbosity)


class JointAttention:
    """SD3's joint attention of image and text tokens through diffusers' attention dispatcher."""

    # diffusers sets it on every processor
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over ``[B, N, C]`` image tokens and, if given, ``[B, M, C]`` text tokens.

        SD3 masks nothing: ``attention_mask`` is part of the interface alone.
        """
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        def heads(projected: Tensor, norm: Any) -> Tensor:
            split = projected.unflatten(-1, (attn.heads, -1))
            return split if norm is None else norm(split)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states), None)
        image_tokens = hidden_states.shape[1]
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            query = torch.cat([query, heads(attn.add_q_proj(text), attn.norm_added_q)], dim=1)
            key = torch.cat([key, heads(attn.add_k_proj(text), attn.norm_added_k)], dim=1)
            value = torch.cat([value, heads(attn.add_v_proj(text), None)], dim=1)
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        out = out.flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](out[:, :image_tokens]))
        if encoder_hidden_states is None:
            return image
        text_out = out[:, image_tokens:]
        return image, text_out if attn.context_pre_only else attn.to_add_out(text_out)
