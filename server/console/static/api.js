// The server's HTTP interface. The key stays in this tab.

const KEY = "loramux-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const session = {
  get key() { return sessionStorage.getItem(KEY); },
  set key(value) { value === null ? sessionStorage.removeItem(KEY) : sessionStorage.setItem(KEY, value); },
};

function headers(more = {}) {
  return session.key === null ? more : { authorization: `Bearer ${session.key}`, ...more };
}

// Rejects with ApiError, whose message is the server's own.
export async function call(method, path, body, signal) {
  const isForm = body instanceof FormData;
  const response = await fetch(path, {
    method,
    signal,
    cache: "no-store",
    headers: headers(body === undefined || isForm ? {} : { "content-type": "application/json" }),
    body: body === undefined || isForm ? body : JSON.stringify(body),
  });
  if (!response.ok) {
    let message = `${response.status} ${response.statusText}`;
    try {
      message = (await response.json()).error.message;
    } catch { /* not one of ours: the status has to do */ }
    throw new ApiError(response.status, message);
  }
  return response;
}

export async function json(method, path, body) {
  const response = await call(method, path, body);
  return response.json();
}

// The JSON objects of a stream of server-sent events.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
