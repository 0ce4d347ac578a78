#!/usr/bin/env node
// The server's time: a page that ticks, and a line of text for those who ask without a browser.

import { setInterval } from 'node:timers/promises';
import { Plugin, Reply } from './plugrack.mjs';

const plugin = new Plugin({
  id: 'clock',
  name: 'Clock',
  version: '1.0.0',
  icon: '🕰️',
  route: '/clock',
  concurrency: 64, // every open page holds a connection
  description: 'The time of the server, live by server-sent events',
});

const page = (mount) => `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Clock</title>
<style>
  body { min-height: 100svh; margin: 0; display: grid; place-content: center; text-align: center; font-family: system-ui, sans-serif; }
  time { font-size: min(20vw, 9rem); font-weight: 200; font-variant-numeric: tabular-nums; }
  .stale time { opacity: .3; }
</style>
<main>
  <time>––:––:––</time>
  <p id="date">&nbsp;</p>
  <p><a href="${mount}/events">the events behind this page</a></p>
</main>
<script>
  const source = new EventSource('${mount}/events');
  const stale = (is) => document.body.classList.toggle('stale', is);
  source.addEventListener('open', () => stale(false));
  source.addEventListener('error', () => stale(true));
  source.addEventListener('tick', ({ data }) => {
    const time = document.querySelector('time');
    time.dateTime = data;
    time.textContent = new Date(data).toLocaleTimeString();
    document.querySelector('#date').textContent = new Date(data).toLocaleDateString(undefined, { dateStyle: 'full' });
  });
</script>
</html>
`;

const now = () => new Date().toISOString();
const tick = () => `event: tick\ndata: ${now()}\n\n`;

/** One tick at once and one every second after it, until the signal ends the interval. */
async function* ticks(signal) {
  yield tick();
  for await (const _ of setInterval(1000, null, { signal })) yield tick();
}

plugin.onHttp((request) => {
  const served = request.path === '/' || request.path === '/events';
  if (!served) return new Reply('not found\n', { status: 404 });
  if (!['GET', 'HEAD'].includes(request.method)) {
    return new Reply('method not allowed\n', { status: 405, headers: { allow: 'GET, HEAD' } });
  }
  const reply = (body, type) =>
    new Reply(body, { headers: { 'content-type': `${type}; charset=utf-8`, 'cache-control': 'no-store', vary: 'accept' } });
  if (request.path === '/events') return reply(ticks(request.signal), 'text/event-stream');
  const browser = request.headers.get('accept')?.includes('text/html');
  return browser ? reply(page(request.mount), 'text/html') : reply(`${now()}\n`, 'text/plain');
});

plugin.run();
