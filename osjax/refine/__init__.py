"""Prompts written anew, and their motion scored, by a language model behind an OpenAI-compatible server.

`OPENAI_API_KEY` and `OPENAI_BASE_URL` say which; the client is in the extra `refine` and imported when it is needed.
"""

from osjax.refine.advice import Advice, Draft, Still, Wanted, advise
from osjax.refine.instructions import Kind
from osjax.refine.server import ServerError, Settings, check

__all__ = ["Advice", "Draft", "Kind", "ServerError", "Settings", "Still", "Wanted", "advise", "check"]
