// The Node clients of `make bench`, the usual alternative. Like clients.py, it reads one JSON job per
// line from stdin and answers each with one JSON line.
//
// node clients.mjs all      fetch and Promise.allSettled over all sessions, 10 s timeout
// node clients.mjs bounded  the same requests, with bounded concurrency
import { createInterface } from "node:readline";

const algorithm = process.argv[2];

async function check(url, n) {
  const response = await fetch(`${url}/checkout_active_${n}`, {
    headers: { "x-api-key": "bench" },
    signal: AbortSignal.timeout(10_000),
  });
  await response.arrayBuffer(); // otherwise the connection is not reused
  if (response.status !== 200) throw new Error(String(response.status));
}

async function all(url, sessions) {
  const checks = Array.from({ length: sessions }, (_, n) => check(url, n));
  const results = await Promise.allSettled(checks);
  return results.filter((result) => result.status === "fulfilled").length;
}

async function bounded(url, sessions, inFlight) {
  let next = 0;
  let ok = 0;
  const worker = async () => {
    while (next < sessions) {
      try {
        await check(url, next++);
        ok++;
      } catch {
        // lost
      }
    }
  };
  await Promise.all(Array.from({ length: inFlight }, worker));
  return ok;
}

for await (const line of createInterface({ input: process.stdin })) {
  const job = JSON.parse(line);
  const began = performance.now();
  const cpu = process.cpuUsage();
  const run = algorithm === "all" && !job.warm_up ? all : bounded;
  const checked = await run(job.url, job.sessions, job.in_flight);
  const seconds = (performance.now() - began) / 1000;
  const { user, system } = process.cpuUsage(cpu);
  const report = {
    checked,
    seconds,
    cpu_seconds: (user + system) / 1e6,
    peak_mb: process.resourceUsage().maxRSS / 1024, // Node uses more than the parent, whose peak it inherits
  };
  console.log(JSON.stringify(report));
}
