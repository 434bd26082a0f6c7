"""The checkpoint's own chat template: messages become the token ids of a prompt, in a sandbox."""

from apertus_mlx.text.messages import Message
from apertus_mlx.text.template.chat_template import ChatTemplate
from apertus_mlx.text.template_process import UnsupportedTemplateError

__all__ = ["ChatTemplate", "Message", "UnsupportedTemplateError"]
