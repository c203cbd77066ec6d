// The console of one virtual machine. The address of this page is the key to it, so everything is relative to that.
import RFB from './novnc/core/rfb.js';

const at = (id) => document.getElementById(id);
const state = (text, bad) => { at('state').textContent = text; at('state').classList.toggle('bad', !!bad); };

let rfb, delay = 500;

fetch('name').then((r) => r.text()).then((name) => { at('name').textContent = name; document.title = name + ' – console'; });

function connect() {
  const url = new URL('screen', location.href);
  url.protocol = location.protocol === 'https:' ? 'wss:' : 'ws:';
  rfb = new RFB(at('screen'), url.href, { wsProtocols: ['binary'] });
  rfb.background = '#14171b';
  rfb.scaleViewport = true;
  rfb.resizeSession = at('resize').checked;
  rfb.addEventListener('connect', () => { delay = 500; state('connected'); rfb.focus(); });
  rfb.addEventListener('disconnect', () => {
    state('not connected: the machine is off, or this address is no good any more. Trying again…', true);
    setTimeout(connect, delay);
    delay = Math.min(delay * 2, 10000);
  });
  rfb.addEventListener('clipboard', (e) => {
    at('text').value = e.detail.text;
    navigator.clipboard?.writeText(e.detail.text).catch(() => {}); // only where the browser allows it
  });
  rfb.addEventListener('desktopname', (e) => { at('screen').title = e.detail.name; });
}

at('ctrlaltdel').onclick = () => { rfb.sendCtrlAltDel(); rfb.focus(); };
at('clip').onclick = () => {
  const hidden = at('clipboard').toggleAttribute('hidden');
  at('clip').setAttribute('aria-expanded', String(!hidden));
};
at('send').onclick = () => { rfb.clipboardPasteFrom(at('text').value); rfb.focus(); };
at('type').onclick = async () => {
  for (const c of at('text').value) {
    const point = c.codePointAt(0);
    // X11's keysyms: Latin-1 is itself, other Unicode is marked, and the end of a line is Return. The machine sees keys, so
    // what is on a key's upper half of a US keyboard takes Shift.
    const keysym = c === '\n' ? 0xff0d : point < 0x100 ? point : 0x01000000 + point;
    const shift = /[A-Z~!@#$%^&*()_+{}|:"<>?]/.test(c);
    if (shift) rfb.sendKey(0xffe1, 'ShiftLeft', true);
    rfb.sendKey(keysym, null);
    if (shift) rfb.sendKey(0xffe1, 'ShiftLeft', false);
    await new Promise((done) => setTimeout(done, 20));
  }
  rfb.focus();
};
at('power').onclick = async () => {
  if (!confirm('Press the power button of this machine?')) return;
  const answer = await fetch('power', { method: 'POST' });
  state(answer.ok ? 'shutting down' : await answer.text(), !answer.ok);
};
at('full').onclick = () => document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen();
at('resize').onchange = () => { rfb.resizeSession = at('resize').checked; };

connect();
