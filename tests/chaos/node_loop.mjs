// The algorithm that this monitor replaces, for `python -m tests.chaos.compare`: at each interval, one
// fetch with a timeout for every open session, all at once. Arguments: URL, interval and timeout in ms,
// number of ticks, checkout ids. Prints the result of each check as one line of JSON.
const [url, interval, timeout, ticks, ...checkouts] = process.argv.slice(2);
const checks = [];
let tick = 0;

async function checkOpenSessions() {
  const results = await Promise.allSettled(
    checkouts.map((checkout) =>
      fetch(`${url}/${encodeURIComponent(checkout)}`, {
        headers: { "x-api-key": process.env.APIKEY },
        signal: AbortSignal.timeout(Number(timeout)),
      }),
    ),
  );
  for (const [n, result] of results.entries()) {
    const outcome = result.status === "fulfilled" ? result.value.status : result.reason.name;
    checks.push([checkouts[n], outcome]);
  }
}

const timer = setInterval(() => {
  checkOpenSessions();
  if (++tick >= Number(ticks)) clearInterval(timer);
}, Number(interval));

// Like a server, the process keeps running; it prints its results after the last check's timeout.
setTimeout(() => {
  console.log(JSON.stringify(checks));
  process.exit(0);
}, (Number(ticks) + 1) * Number(interval) + Number(timeout) + 300);
