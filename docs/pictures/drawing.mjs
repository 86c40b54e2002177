// Draws the data flow of a job for ARCHITECTURE.md, in light and dark.
import { writeFileSync } from "node:fs";

const THEMES = {
  light: { text: "#1f2328", faint: "#59636e", line: "#8c959f", box: "#f6f8fa", ours: "#ddf4e4", cache: "#ddf0ff" },
  dark: { text: "#f0f6fc", faint: "#9198a1", line: "#6e7681", box: "#21262d", ours: "#12381f", cache: "#0c2d4d" },
};

const STEPS = [
  { y: 10, height: 100, name: "main step" },
  { y: 125, height: 190, name: "steps of the workflow" },
  { y: 330, height: 90, name: "post step" },
];

// What is the action's own is `ours`.
const BOXES = {
  main: { x: 30, y: 40, width: 150, text: "node dist/main.js", kind: "ours" },
  setup: { x: 240, y: 40, width: 180, text: "sccache-action setup", kind: "ours" },
  build: { x: 30, y: 160, width: 150, text: "cargo, CMake, make", kind: "box" },
  wrapper: { x: 240, y: 160, width: 180, text: "wrapper, called sccache", kind: "ours" },
  compiler: { x: 240, y: 255, width: 180, text: "compiler", kind: "box" },
  server: { x: 490, y: 160, width: 150, text: "sccache's server", kind: "box" },
  disk: { x: 490, y: 255, width: 150, text: "disk tier", kind: "box" },
  relay: { x: 710, y: 160, width: 150, text: "relay", kind: "ours" },
  service: { x: 710, y: 40, width: 150, text: "GitHub's cache", kind: "cache" },
  post: { x: 30, y: 360, width: 150, text: "node dist/post.js", kind: "ours" },
  report: { x: 240, y: 360, width: 180, text: "sccache-action report", kind: "ours" },
  summary: { x: 490, y: 360, width: 150, text: "job summary", kind: "box" },
};
const HEIGHT = 40;

// Points of each line, and where its text is.
const ARROWS = [
  { points: [[180, 60], [240, 60]] },
  { points: [[420, 60], [680, 60], [680, 170], [710, 170]], text: "starts it, token through a pipe", at: [550, 52] },
  { points: [[180, 180], [240, 180]], text: "each compile", at: [210, 150] },
  { points: [[420, 180], [490, 180]], text: "asks", at: [455, 172] },
  { points: [[330, 200], [330, 255]], text: "if sccache fails", at: [385, 232] },
  { points: [[565, 200], [565, 255]], text: "first", at: [585, 232] },
  { points: [[640, 180], [710, 180]], text: "then", at: [672, 194] },
  { points: [[785, 160], [785, 80]], text: "packs", at: [808, 124], both: true },
  { points: [[785, 200], [785, 275], [640, 275]], text: "fills it before the build", at: [762, 293], both: true },
  { points: [[180, 380], [240, 380]] },
  { points: [[420, 380], [490, 380]] },
  { points: [[330, 360], [330, 322], [830, 322], [830, 200]], text: "saves the pending objects, and ends", at: [690, 338] },
];

function escape(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

function draw(theme) {
  const colours = THEMES[theme];
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 890 430" role="img" font-family="-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="13">`,
    `<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="${colours.line}"/></marker></defs>`,
  ];
  for (const step of STEPS) {
    parts.push(
      `<rect x="10" y="${step.y}" width="870" height="${step.height}" rx="8" fill="none" stroke="${colours.line}" stroke-opacity="0.4"/>`,
      `<text x="22" y="${step.y + 18}" fill="${colours.faint}" font-size="12">${step.name}</text>`,
    );
  }
  for (const arrow of ARROWS) {
    const points = arrow.points.map((point) => point.join(",")).join(" ");
    const start = arrow.both ? ` marker-start="url(#end)"` : "";
    parts.push(
      `<polyline points="${points}" fill="none" stroke="${colours.line}" stroke-width="1.5" marker-end="url(#end)"${start}/>`,
    );
    if (arrow.text) {
      const [x, y] = arrow.at;
      parts.push(`<text x="${x}" y="${y}" fill="${colours.faint}" font-size="11" text-anchor="middle">${escape(arrow.text)}</text>`);
    }
  }
  for (const box of Object.values(BOXES)) {
    parts.push(
      `<rect x="${box.x}" y="${box.y}" width="${box.width}" height="${HEIGHT}" rx="6" fill="${colours[box.kind]}" stroke="${colours.line}"/>`,
      `<text x="${box.x + box.width / 2}" y="${box.y + HEIGHT / 2 + 4}" fill="${colours.text}" text-anchor="middle">${escape(box.text)}</text>`,
    );
  }
  parts.push("</svg>\n");
  return parts.join("");
}

for (const theme of Object.keys(THEMES)) {
  writeFileSync(`docs/pictures/job-${theme}.svg`, draw(theme));
}
