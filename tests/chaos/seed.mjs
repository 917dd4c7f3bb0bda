// What this monitor replaces, for `python -m tests.chaos.compare`: every interval, one fetch for each
// open session, all at once, each with a time-out. Arguments: URL, interval and time-out in ms, ticks,
// then the checkout ids. Prints what became of each check, one JSON line.
const [url, interval, timeout, ticks, ...checkouts] = process.argv.slice(2);
const told = [];
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
    const what = result.status === "fulfilled" ? result.value.status : result.reason.name;
    told.push([checkouts[n], what]);
  }
}

const timer = setInterval(() => {
  checkOpenSessions();
  if (++tick >= Number(ticks)) clearInterval(timer);
}, Number(interval));

// As a server does, it stays; a moment after the last check can have ended, it says what it found.
setTimeout(() => {
  console.log(JSON.stringify(told));
  process.exit(0);
}, (Number(ticks) + 1) * Number(interval) + Number(timeout) + 300);
