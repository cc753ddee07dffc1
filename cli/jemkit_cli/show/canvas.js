const canvas = element.querySelector("canvas"), colour = element.querySelector("input");
const pen = canvas.getContext("2d", { willReadFrequently: true });
let last = null;
function clear() {
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [
    ((event.clientX - box.left) / box.width) * canvas.width,
    ((event.clientY - box.top) / box.height) * canvas.height,
  ];
}
function draw(event) {
  if (!last) return;
  const now = place(event);
  pen.strokeStyle = colour ? colour.value : "#fff";
  pen.lineWidth = Math.max(1.6, canvas.width / 9);
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(last[0], last[1]);
  pen.lineTo(now[0] + 0.01, now[1]);
  pen.stroke();
  last = now;
}
function send() {
  const rgba = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  let text = "";
  for (let i = 0; i < rgba.length; i++)
    if (i % 4 < 3) text += rgba[i].toString(16).padStart(2, "0");
  props.value = text;
  trigger("change");
}
canvas.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  draw(event);
});
canvas.addEventListener("pointermove", draw);
canvas.addEventListener("pointerup", () => {
  last = null;
  send();
});
canvas.addEventListener("pointercancel", () => (last = null));
element.querySelector("button").addEventListener("click", () => {
  clear();
  send();
});
clear();
