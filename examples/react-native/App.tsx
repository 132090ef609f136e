/**
 * Digits drawn on a phone train a network of which the phone holds the first and last layers.
 *
 * Drawings and labels never leave the phone; activations and gradients do.
 */

import "react-native-get-random-values"; // crypto.getRandomValues, which sessions are named by
import { SplitClient } from "@splitonnx/client";
import * as ort from "onnxruntime-react-native";
import { useEffect, useRef, useState } from "react";
import { Pressable, StyleSheet, Text, View } from "react-native";

import { BLANK, SIDE, toBatch, toImages } from "./drawings";
import type { Drawing } from "./drawings";
import { FileStorage, readShipped } from "./files";

const SERVER = "wss://lab.example:8765";
const TOKEN = undefined; // what `splitonnx token` printed for this user, from the keychain

/** Connect once, while the screen is there. */
function useClient(say: (text: string) => void): SplitClient | undefined {
  const [client, setClient] = useState<SplitClient>();
  useEffect(() => {
    let isGone = false;
    const connecting = SplitClient.connect(SERVER, {
      ort,
      token: TOKEN,
      bundle: readShipped,
      storage: new FileStorage(),
      resume: true, // a phone may end an app at any moment
      giveUpAfter: 60,
      trusted: true, // the part was shipped with the app, in ORT format
      onReconnect: (cause) => say(`connecting again: ${cause.message}`),
    });
    connecting.then(
      (made) => (isGone ? undefined : setClient(made)),
      (error: unknown) => say(String(error)),
    );
    return () => {
      isGone = true;
      connecting.then((made) => made.close()).catch(() => undefined); // it was said above
    };
  }, [say]);
  return client;
}

export default function App() {
  const [cells, setCells] = useState(BLANK);
  const [drawings, setDrawings] = useState<readonly Drawing[]>([]);
  const [isBusy, setBusy] = useState(false);
  const [status, setStatus] = useState("connecting");
  const say = useRef(setStatus).current;
  const client = useClient(say);

  async function act(work: (client: SplitClient) => Promise<string>) {
    if (!client) return;
    setBusy(true);
    try {
      say(await work(client));
    } catch (error) {
      say(String(error));
    } finally {
      setBusy(false);
    }
  }

  const train = () =>
    act(async (client) => {
      const history = await client.fit(toBatch(drawings), {
        epochs: 20,
        batchSize: 16,
        checkpointEvery: 20,
        onStep: ({ step, loss }) => say(`step ${step}: loss ${loss.toFixed(3)}`),
      });
      await client.save();
      return `${history.steps.length} steps, saved on both sides`;
    });

  const recognise = () =>
    act(async (client) => {
      const { logits } = await client.predict(toImages([{ cells }]));
      if (!(logits?.data instanceof Float32Array)) return "the model has no output 'logits'";
      return `that is a ${logits.data.indexOf(Math.max(...logits.data))}`;
    });

  const keep = (digit: number) => {
    setDrawings([...drawings, { cells, digit }]);
    setCells(BLANK);
  };

  const isReady = client !== undefined && !isBusy;
  return (
    <View style={styles.screen}>
      <View style={styles.grid}>
        {cells.map((isBlack, index) => (
          <Pressable
            key={index}
            accessibilityLabel={`row ${Math.floor(index / SIDE) + 1}, column ${(index % SIDE) + 1}`}
            onPress={() => setCells(cells.map((cell, at) => (at === index ? !cell : cell)))}
            style={[styles.cell, isBlack && styles.black]}
          />
        ))}
      </View>
      <View style={styles.row}>
        {Array.from({ length: 10 }, (_, digit) => (
          <Button key={digit} title={String(digit)} onPress={() => keep(digit)} isEnabled />
        ))}
      </View>
      <View style={styles.row}>
        <Button
          title={`Train on ${drawings.length}`}
          onPress={train}
          isEnabled={isReady && drawings.length > 0}
        />
        <Button title="Recognise" onPress={recognise} isEnabled={isReady} />
      </View>
      <Text accessibilityLiveRegion="polite">{status}</Text>
    </View>
  );
}

interface ButtonProps {
  readonly title: string;
  readonly isEnabled: boolean;
  readonly onPress: () => void;
}

function Button({ title, isEnabled, onPress }: ButtonProps) {
  return (
    <Pressable
      accessibilityRole="button"
      disabled={!isEnabled}
      onPress={onPress}
      style={[styles.button, !isEnabled && styles.disabled]}
    >
      <Text>{title}</Text>
    </Pressable>
  );
}

const styles = StyleSheet.create({
  screen: { flex: 1, paddingTop: 64, padding: 16, gap: 16 },
  grid: { flexDirection: "row", flexWrap: "wrap", aspectRatio: 1 },
  cell: { width: `${100 / SIDE}%`, aspectRatio: 1, borderWidth: 1, borderColor: "#ccc" },
  black: { backgroundColor: "#222" },
  row: { flexDirection: "row", flexWrap: "wrap", gap: 8 },
  button: { padding: 12, minWidth: 48, alignItems: "center", backgroundColor: "#def" },
  disabled: { opacity: 0.4 },
});
