"""Errors of the server, in the form that OpenAI's clients read."""

from typing import Any


class ApiError(Exception):
  """An answer that is an error.

  Attributes:
    status: of HTTP.
    message: for the user: what was given, and what is allowed.
    param: the field that is wrong; None: none.
    code: a word for programs; None: none.
    headers: of the answer.
  """

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = headers or {}

  def body(self) -> dict[str, Any]:
    """What the client gets."""
    kind = 'invalid_request_error' if self.status < 500 else 'server_error'
    return {'error': {'message': self.message, 'type': kind, 'param': self.param, 'code': self.code}}
