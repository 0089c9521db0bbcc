// Prometheus' text format, and what follows from two readings of it.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

function number(text) {
  return text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);
}

// Map of name to a list of { labels, value }.
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (match === null) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (_, character) => ESCAPES[character] ?? character);
    }
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: number(match[3]) });
  }
  return found;
}

export function sum(metrics, name, where = {}) {
  let total = 0;
  for (const { labels, value } of metrics.get(name) ?? []) {
    if (Object.entries(where).every(([label, wanted]) => labels[label] === wanted)) total += value;
  }
  return total;
}

export function values(metrics, name, label) {
  return [...new Set((metrics.get(name) ?? []).map(({ labels }) => labels[label]))];
}

// Cumulative counts by upper bound, ascending, of a histogram summed over its other labels.
function buckets(metrics, name, where) {
  const counts = new Map();
  for (const { labels, value } of metrics.get(`${name}_bucket`) ?? []) {
    if (!Object.entries(where).every(([label, wanted]) => labels[label] === wanted)) continue;
    const bound = number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([first], [second]) => first - second);
}

// The quantile of what was observed since `before` (null: ever), interpolated within its bucket; null for nothing.
export function quantile(metrics, before, name, share, where = {}) {
  const earlier = new Map(before === null ? [] : buckets(before, name, where));
  const counts = buckets(metrics, name, where).map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
  const total = counts.length ? counts[counts.length - 1][1] : 0;
  if (total <= 0) return null;
  let low = 0;
  let below = 0;
  for (const [bound, count] of counts) {
    if (count >= share * total) {
      if (bound === Infinity) return low;
      return low + (bound - low) * (count > below ? (share * total - below) / (count - below) : 1);
    }
    [low, below] = [bound, count];
  }
  return low;
}
