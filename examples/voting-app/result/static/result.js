// Shows the counts as the server sends them.
const id = (name) => document.getElementById(name);
const names = { a: id("side-a").querySelector("h2").textContent, b: id("side-b").querySelector("h2").textContent };
const plural = (n) => (n === 1 ? "vote" : "votes");
const format = new Intl.NumberFormat();
let speaking;

function live(state, text) {
  id("live").dataset.state = state;
  id("live-text").textContent = text;
}

function show({ a, b, total }) {
  const share = { a: total ? Math.round((a / total) * 1000) / 10 : 0 };
  share.b = total ? Math.round((100 - share.a) * 10) / 10 : 0;
  for (const [side, count] of [["a", a], ["b", b]]) {
    id(`${side}-percent`).textContent = share[side].toFixed(1).replace(/\.0$/, "");
    id(`${side}-count`).textContent = format.format(count);
    id(`${side}-word`).textContent = plural(count);
    id(`fill-${side}`).style.width = `${share[side]}%`;
  }
  id("bar").classList.toggle("counted", total > 0);
  id("side-a").classList.toggle("leading", a > b);
  id("side-b").classList.toggle("leading", b > a);
  id("total").textContent = format.format(total);
  id("total-word").textContent = `${plural(total)} in total`;
  const sentence = total ? `${names.a} ${share.a} percent, ${names.b} ${share.b} percent, ${total} ${plural(total)}` : "No votes yet";
  id("bar").setAttribute("aria-label", sentence);
  // Spoken when it has been quiet for a moment, not with every vote.
  clearTimeout(speaking);
  speaking = setTimeout(() => { id("spoken").textContent = sentence; }, 1500);
}

const events = new EventSource("/events");
events.addEventListener("counts", (e) => {
  live("live", "Live");
  show(JSON.parse(e.data));
});
events.addEventListener("waiting", () => live("waiting", "Waiting for the database"));
events.addEventListener("error", () => live("waiting", "Reconnecting"));
