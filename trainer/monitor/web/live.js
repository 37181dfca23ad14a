"use strict";
// The page's parts arrive as server-sent events, each with the id of the element that it fills.
const narrow = matchMedia("(max-width: 1000px)");
const connection = document.getElementById("connection");
let source, again, over = false, ahead = 0; // `ahead`: seconds by which the server's clock is ahead of this one

function show(message) {
  connection.textContent = message;
  connection.hidden = !message;
}

function connect() {
  clearTimeout(again);
  source?.close();
  source = new EventSource(narrow.matches ? "events?narrow" : "events?wide");
  source.addEventListener("open", () => show(""));
  source.addEventListener("part", event => {
    const { id, html } = JSON.parse(event.data), place = document.getElementById(id);
    if (place) place.innerHTML = html;
    if (id === "workers") ages();
  });
  source.addEventListener("clock", event => { ahead = Number(event.data) - Date.now() / 1000; ages(); });
  source.addEventListener("over", () => { over = true; });
  source.addEventListener("error", () => {
    show(over ? "The run has ended. This page shows its last state." : "Connection lost, trying again …");
    if (source.readyState === EventSource.CLOSED) again = setTimeout(connect, 2000); // otherwise the browser reconnects
  });
}

function ages() {
  for (const place of document.querySelectorAll("time[data-at]")) {
    const seconds = Math.max(0, Date.now() / 1000 + ahead - Number(place.dataset.at));
    place.textContent = seconds < 120 ? `${Math.round(seconds)} s ago` : seconds < 7200 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
  }
}

narrow.addEventListener("change", connect);
setInterval(ages, 1000);
connect();
