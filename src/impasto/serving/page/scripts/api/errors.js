// What goes wrong between the page and the server.

/** The server's answer is an error. `retryAfter`: seconds, if it is worth trying again. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The error of a response that is not ok. */
export async function errorOf(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Something between the server and us has answered.
  }
  const wait = Number(response.headers.get("retry-after"));
  const again = response.status === 429 || response.status === 503;
  return new ApiError(message, response.status, again ? Math.min(Math.max(wait || 2, 1), 120) : null);
}
