import Foundation
import Testing

@testable import ApertusCore

/// The files that `convert` writes beside the weights.
@Suite struct ManifestTests {
    @Test func whatConvertWroteIsWhole() throws {
        for name in ["converted-bf16", "converted-4", "converted-mixed", "converted-mxfp4"] {
            let folder = try Fixtures.folder.appendingPathComponent("checkpoints/\(name)")
            let manifest = try #require(try Manifest(folder: folder))
            try manifest.checkSizes(folder)
            var last = (done: 0, total: 1)
            #expect(try manifest.verify(folder) { last = ($0, $1) } == [])
            #expect(last.done == last.total)
            let checkpoint = try Checkpoint(folder: folder)
            #expect(manifest.memory == MemoryTerms(checkpoint))
            #expect(manifest.architecture["parameters"] == Layout.parameterCount(checkpoint.config))
            #expect(manifest.architecture.count == 10)
            try manifest.check(checkpoint.config)
            #expect(manifest.chatTemplate == "v1" && manifest.defaultSystem == "")
            let other = try Fixtures.folder.appendingPathComponent("checkpoints/plain")
            #expect(throws: ApertusError.self) { try manifest.check(ModelConfig(folder: other)) }
        }
        let demo = try Fixtures.folder.appendingPathComponent("checkpoints/demo")
        #expect(try Manifest(folder: demo) == nil)
    }

    @Test func damageIsFound() throws {
        let folder = try Scratch.copy("checkpoints/converted-4")
        defer { try? FileManager.default.removeItem(at: folder) }
        let manifest = try #require(try Manifest(folder: folder))
        let weights = folder.appendingPathComponent("model.safetensors")
        var content = try Data(contentsOf: weights)
        content[content.count - 5] ^= 1
        try content.write(to: weights)
        try Data("{}".utf8).write(to: folder.appendingPathComponent("generation_config.json"))
        try FileManager.default.removeItem(at: folder.appendingPathComponent("tokenizer.json"))
        let found = try manifest.verify(folder)
        let texts = found.map { "\($0.file): \($0.text)" }
        #expect(texts.count == 3)
        #expect(texts[0].hasPrefix("generation_config.json: has 2 bytes"))
        #expect(texts[1] == "model.safetensors: was changed: its hash is not the manifest's")
        #expect(texts[2] == "tokenizer.json: is missing")
        let error = #expect(throws: ApertusError.self) { try manifest.checkSizes(folder) }
        #expect(error?.description.contains("generation_config.json") == true)
    }

    @Test(arguments: [
        "", "[]", #"{"format_version": 2}"#, #"{"format_version": 1, "files": {}}"#,
        #"{"format_version": 1, "files": {"../x": {"size_bytes": 1, "sha256": "0"}}}"#,
        #"{"format_version": 1, "files": {"x": {"size_bytes": 1, "sha256": "0"}}}"#,
        #"{"format_version": 1, "files": {"x": 1}}"#,
    ])
    func damagedManifestsAreRefused(_ text: String) throws {
        #expect(throws: ApertusError.self) {
            try Manifest(parseObject(Data(text.utf8), name: "m"), name: "m")
        }
    }

    /// Vectors of FIPS 180-2.
    @Test func hashes() throws {
        func hex(_ data: Data, _ cut: Int) -> String {
            var digest = Digest256()
            for start in stride(from: 0, to: data.count, by: cut) {
                digest.update(data[start ..< min(start + cut, data.count)])
            }
            return digest.finish().map { String(format: "%02x", $0) }.joined()
        }
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        let two = "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
        let none = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        let text = Data("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq".utf8)
        #expect(hex(Data("abc".utf8), 64) == abc)
        #expect(hex(Data(), 1) == none)
        for cut in [1, 7, 55, 56, 64] { #expect(hex(text, cut) == two) }
    }

    @Test func filesThatAreRefusedAreClosed() throws {
        let folder = try Fixtures.folder.appendingPathComponent("checkpoints/converted-4")
        let url = folder.appendingPathComponent("config.json")
        func descriptor() -> Int32 { open("/dev/null", O_RDONLY) }
        let before = descriptor()
        for _ in 0 ..< 300 {
            #expect(throws: ApertusError.self) { try ModelFile(url, atMost: 1) }
            #expect(try ModelFile(url).size > 1)
        }
        // Descriptors are given from below; other tests hold some meanwhile.
        let after = descriptor()
        #expect(after < before + 200)
        close(before)
        close(after)
    }

    @Test func goldenPromptsAreEncodedAlike() throws {
        let folder = try Fixtures.folder.appendingPathComponent("checkpoints/converted-4")
        let prompts = try #require(try GoldenPrompts(folder: folder))
        #expect(prompts.texts.count == 4 && prompts.conversations.count == 6)
        #expect(prompts.differing(try Tokenizer(folder: folder)) == [])
        #expect(prompts.conversations.contains { $0.thinks })
        #expect(prompts.conversations.filter { !$0.tools.isEmpty }.count == 2)
        let answers = try #require(try GoldenAnswers(folder: folder))
        #expect(answers.answers.count == 8)
        for answer in answers.answers {
            #expect(answer.ids.count == 16 && !answer.promptIds.isEmpty)
            #expect(answer.firstDifference(answer.ids, clearMargin: answers.clearMargin) == nil)
            let clear = answer.clearCount(answers.clearMargin)
            guard clear > 0 else { continue }
            var wrong = answer.ids
            wrong[clear - 1] ^= 1
            #expect(answer.firstDifference(wrong, clearMargin: answers.clearMargin) == clear - 1)
            #expect(answer.firstDifference([], clearMargin: answers.clearMargin) == 0)
        }
        let demo = try Fixtures.folder.appendingPathComponent("checkpoints/demo")
        #expect(try GoldenPrompts(folder: demo) == nil && GoldenAnswers(folder: demo) == nil)
    }
}

/// Folders that a test may change.
enum Scratch {
    /// A copy of a fixture's folder.
    static func copy(_ path: String) throws -> URL {
        let folder = FileManager.default.temporaryDirectory
            .appendingPathComponent("apertus-core-\(UUID().uuidString)")
        try FileManager.default.copyItem(
            at: try Fixtures.folder.appendingPathComponent(path), to: folder)
        return folder
    }
}
