// Verifies a log of Minga with Go's own golang.org/x/mod/sumdb/note and tlog, and with nothing of ours.
//
//	gocheck LOG_DIR LOG_VKEY_FILE
//
// 1. The checkpoint is a note that the log's key signed. 2. Every tile leads to its root. 3. Every
// entry of every bundle stands in the tree, by an inclusion proof that is made from the tiles and
// checked. 4. Every archived checkpoint is signed and the tree extends it, by a consistency proof.
// 5. Every proof file holds. Prints what it found as JSON; exits 1 with a sentence at the first
// thing that does not hold.
package main

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const height = 8 // levels in one tile

func fail(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(1)
}

func read(path string) []byte {
	data, err := os.ReadFile(path)
	if err != nil {
		fail("%v", err)
	}
	return data
}

// tiles reads the C2SP layout, which is Go's without the element for the height.
type tiles struct{ dir string }

func (t tiles) Height() int { return height }

func (t tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func (t tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	found := make([][]byte, len(wanted))
	for i, tile := range wanted {
		data, err := os.ReadFile(filepath.Join(t.dir, c2sp(tile, strconv.Itoa(tile.L))))
		if err != nil {
			return nil, err
		}
		found[i] = data
	}
	return found, nil
}

func c2sp(tile tlog.Tile, level string) string {
	path := tile.Path() // tile/8/<L>/<N>[.p/<W>]
	rest := strings.SplitN(path, "/", 4)[3]
	return "tile/" + level + "/" + rest
}

type head struct {
	origin string
	tree   tlog.Tree
}

// open checks the signature and reads the three lines of a checkpoint.
func open(data []byte, key note.Verifier, what string) head {
	signed, err := note.Open(data, note.VerifierList(key))
	if err != nil {
		fail("%s: %v", what, err)
	}
	lines := strings.Split(signed.Text, "\n")
	if len(lines) != 4 || lines[3] != "" {
		fail("%s: not three lines", what)
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		fail("%s: %v", what, err)
	}
	root, err := tlog.ParseHash(lines[2])
	if err != nil {
		fail("%s: %v", what, err)
	}
	if lines[0] != key.Name() {
		fail("%s: origin %s, key %s", what, lines[0], key.Name())
	}
	return head{lines[0], tlog.Tree{N: size, Hash: root}}
}

// entries reads every bundle of a log of that size.
func entries(dir string, size int64) [][]byte {
	var all [][]byte
	for n := int64(0); n*256 < size; n++ {
		width := min(256, size-n*256)
		tile := tlog.Tile{H: height, L: 0, N: n, W: int(width)}
		data := read(filepath.Join(dir, c2sp(tile, "entries")))
		for i := int64(0); i < width; i++ {
			if len(data) < 2 {
				fail("bundle %d ends after %d entries", n, i)
			}
			length := int(binary.BigEndian.Uint16(data))
			if len(data) < 2+length {
				fail("bundle %d ends inside entry %d", n, i)
			}
			all = append(all, data[2:2+length])
			data = data[2+length:]
		}
		if len(data) != 0 {
			fail("bundle %d has %d bytes too many", n, len(data))
		}
	}
	return all
}

func checkProofFile(path string, entry []byte, index int64, key note.Verifier) {
	parts := strings.SplitN(string(read(path)), "\n\n", 2)
	if len(parts) != 2 {
		fail("%s: no empty line", path)
	}
	lines := strings.Split(parts[0], "\n")
	if len(lines) < 2 || lines[0] != "c2sp.org/tlog-proof@v1" || lines[1] != fmt.Sprintf("index %d", index) {
		fail("%s: not a proof of leaf %d", path, index)
	}
	var proof tlog.RecordProof
	for _, line := range lines[2:] {
		raw, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(raw) != tlog.HashSize {
			fail("%s: a hash is malformed", path)
		}
		proof = append(proof, tlog.Hash(raw))
	}
	at := open([]byte(parts[1]), key, path)
	if err := tlog.CheckRecord(proof, at.tree.N, at.tree.Hash, index, tlog.RecordHash(entry)); err != nil {
		fail("%s: %v", path, err)
	}
}

func main() {
	if len(os.Args) != 3 {
		fail("usage: gocheck LOG_DIR LOG_VKEY_FILE")
	}
	dir := os.Args[1]
	key, err := note.NewVerifier(strings.TrimSpace(string(read(os.Args[2]))))
	if err != nil {
		fail("the log key: %v", err)
	}
	now := open(read(filepath.Join(dir, "checkpoint")), key, "checkpoint")
	hashes := tlog.TileHashReader(now.tree, tiles{dir}) // verifies each tile against the root
	all := entries(dir, now.tree.N)
	for i, entry := range all {
		proof, err := tlog.ProveRecord(now.tree.N, int64(i), hashes)
		if err != nil {
			fail("leaf %d: %v", i, err)
		}
		if err := tlog.CheckRecord(proof, now.tree.N, now.tree.Hash, int64(i), tlog.RecordHash(entry)); err != nil {
			fail("leaf %d: %v", i, err)
		}
	}
	archive, _ := filepath.Glob(filepath.Join(dir, "checkpoints", "*"))
	for _, path := range archive {
		before := open(read(path), key, path)
		if filepath.Base(path) != strconv.FormatInt(before.tree.N, 10) {
			fail("%s: it is of size %d", path, before.tree.N)
		}
		if before.tree.N == 0 {
			continue
		}
		proof, err := tlog.ProveTree(now.tree.N, before.tree.N, hashes)
		if err != nil {
			fail("%s: %v", path, err)
		}
		if err := tlog.CheckTree(proof, now.tree.N, now.tree.Hash, before.tree.N, before.tree.Hash); err != nil {
			fail("%s: %v", path, err)
		}
	}
	files, _ := filepath.Glob(filepath.Join(dir, "proofs", "*.tlog-proof"))
	for _, path := range files {
		index, err := strconv.ParseInt(strings.TrimSuffix(filepath.Base(path), ".tlog-proof"), 10, 64)
		if err != nil || index < 0 || index >= int64(len(all)) {
			fail("%s: no such leaf", path)
		}
		checkProofFile(path, all[index], index, key)
	}
	_ = json.NewEncoder(os.Stdout).Encode(map[string]any{
		"origin": now.origin, "size": now.tree.N, "leaves": len(all),
		"archived": len(archive), "proof_files": len(files),
	})
}
