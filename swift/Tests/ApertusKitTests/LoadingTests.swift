import ApertusKit
import Foundation
import Testing

@Suite(.serialized) struct LoadingTests {
    /// Without weights there, the plan alone can refuse.
    @Test func theGateRefusesBeforeWeightsAreOpened() async throws {
        let folder = try KitFixtures.copy()
        defer { try? FileManager.default.removeItem(at: folder) }
        for name in try FileManager.default.contentsOfDirectory(atPath: folder.path)
        where name.hasSuffix(".safetensors") {
            try FileManager.default.removeItem(at: folder.appendingPathComponent(name))
        }
        var options = LoadOptions()
        options.memoryLimit = 1_000_000
        await #expect {
            _ = try await Apertus(folder: folder, options: options)
        } throws: { ($0 as? ApertusError)?.kind == .resource }
        await #expect {
            _ = try await Apertus(folder: folder)
        } throws: { error in
            let error = error as? ApertusError
            return error?.kind == .rejected
                && error?.description.contains("model.safetensors") == true
        }
    }

    @Test func noFolderIsNotFound() async throws {
        await #expect {
            _ = try await Apertus(folder: URL(fileURLWithPath: "/nowhere/to/be/found"))
        } throws: { ($0 as? ApertusError)?.kind == .notFound }
    }

    /// What models took, 50 at night, is free again when the last reference is gone.
    @Test func loadsLeaveNoMemoryBehind() async throws {
        func once() async throws {
            let apertus = try await KitFixtures.load()
            var options = AnswerOptions.greedy
            options.maxTokens = 1
            _ = try await text(of: apertus.conversation().ask("Hi", options: options))
        }
        try await once()
        let (start, count) = (try await held(), sized(50, 20))
        for _ in 0 ..< count { try await once() }
        // Other tests hold models meanwhile, but not one for each load.
        let weights = try await KitFixtures.load().plan.footprint.weightsBytes
        #expect(try await held() - start < count * weights / 2)
    }

    /// What MLX holds while just one model is loaded.
    private func held() async throws -> Int {
        let apertus = try await KitFixtures.load()
        await apertus.clearCaches()
        return apertus.memory.active
    }

    @Test func theSelfTestPasses() async throws {
        let result = try await KitFixtures.load().selfTest()
        #expect(result.difference == nil)
        #expect(result.coversArithmetic)
        #expect(result.texts > 0 && result.conversations > 0 && result.answerTokens > 0)
    }

    /// A weight of another size computes another answer, which no check of shapes can see.
    @Test func theSelfTestNoticesAWrongWeight() async throws {
        let folder = try KitFixtures.copy()
        defer { try? FileManager.default.removeItem(at: folder) }
        let path = folder.appendingPathComponent("model.safetensors")
        var data = try Data(contentsOf: path)
        // The last part of the file holds codes and scales; nothing in the header changes.
        let from = data.count / 2
        for index in stride(from: from, to: from + data.count / 8, by: 2) { data[index] ^= 0x40 }
        try data.write(to: path)
        let difference = try #require(try await Apertus(folder: folder).selfTest().difference)
        #expect(difference.part == .answer)
        #expect(difference.expected != difference.found)
    }

    @Test func theSelfTestNoticesAnotherTokenizer() async throws {
        let folder = try KitFixtures.copy()
        defer { try? FileManager.default.removeItem(at: folder) }
        let path = folder.appendingPathComponent("apertus_mlx_golden_prompts.json")
        let text = try String(contentsOf: path, encoding: .utf8)
        try text.replacingOccurrences(of: "France", with: "Sweden").write(
            to: path, atomically: true, encoding: .utf8)
        try FileManager.default.removeItem(
            at: folder.appendingPathComponent("apertus_mlx_manifest.json"))
        var options = LoadOptions()
        options.chatTemplate = "v1"
        let result = try await Apertus(folder: folder, options: options).selfTest()
        #expect(result.difference?.part == .text)
    }

    @Test func verificationFindsWhatWasChanged() async throws {
        #expect(try Verification(folder: KitFixtures.model).errors.isEmpty)
        let folder = try KitFixtures.copy()
        defer { try? FileManager.default.removeItem(at: folder) }
        try Data("{}".utf8).write(to: folder.appendingPathComponent("generation_config.json"))
        try Data().write(to: folder.appendingPathComponent("left.txt"))
        let findings = try Verification(folder: folder).findings
        #expect(findings.contains { $0.level == .error && $0.place == "generation_config.json" })
        #expect(findings.contains { $0.level == .warning && $0.place == "left.txt" })
    }
}
